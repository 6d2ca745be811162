"""`python -m gdrq_mm COMMAND`: the command `gdrq`, also for launchers such as `torchrun -m gdrq_mm`."""

from .commands import main

if __name__ == '__main__':
    main()
