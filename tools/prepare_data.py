#!/usr/bin/env python
"""Prepare a data set in the layout that the configs expect."""

import argparse

from gdrq_mm.cli import main
from gdrq_mm.datasets import cifar10, digits
from gdrq_mm.errors import UserError


def prepare() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('dataset', choices=['digits', 'cifar10'])
    parser.add_argument('--source', help='archive, or the folder that holds it (digits needs none)')
    parser.add_argument('--out', help='folder to write (default: data/<dataset>)')
    parser.add_argument('--sheet', help='digits only: also draw a picture sheet into this PNG')
    args = parser.parse_args()
    out = args.out or f'data/{args.dataset}'
    if args.dataset == 'digits':
        print(digits.build(out))
        if args.sheet:
            digits.picture_sheet(out, args.sheet)
    elif args.source is None:
        raise UserError(
            'cifar10 needs --source PATH: an archive with a folder per class, or the official python archive'
        )
    else:
        print(cifar10.build(args.source, out))


if __name__ == '__main__':
    main(prepare)
