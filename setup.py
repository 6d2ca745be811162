"""What pyproject.toml cannot say: a wheel holds the commit that it was built from, for the records of its users."""

import json
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRevision(build_py):
    """Writes gdrq_mm/revision.json, unless the source is no checkout of its own or is installed in place."""

    def run(self):
        super().run()
        here = Path(__file__).resolve().parent

        def git(*args):
            return subprocess.run(['git', '-C', here, *args], capture_output=True, text=True, check=True).stdout.strip()

        try:
            if self.editable_mode or Path(git('rev-parse', '--show-toplevel')) != here:
                return
            dirty = bool(git('status', '--porcelain', '--untracked-files=no', '--', '.', ':!docs'))
            found = dict(commit=git('rev-parse', 'HEAD'), dirty=dirty)
        except (OSError, subprocess.CalledProcessError):
            return
        Path(self.build_lib, 'gdrq_mm/revision.json').write_text(json.dumps(found) + '\n')


setup(cmdclass=dict(build_py=BuildWithRevision))
