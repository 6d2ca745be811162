#!/usr/bin/env python
from gdrq_mm.commands import main

if __name__ == '__main__':
    main('allocate')
