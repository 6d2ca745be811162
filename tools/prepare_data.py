#!/usr/bin/env python
"""Prepare a data set in the layout that the configs expect."""

import argparse

from gdrq_mm.cli import main
from gdrq_mm.datasets import digits


def prepare() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('dataset', choices=['digits'])
    parser.add_argument('--out', help='folder to write (default: data/<dataset>)')
    args = parser.parse_args()
    print(digits.build(args.out or f'data/{args.dataset}'))


if __name__ == '__main__':
    main(prepare)
