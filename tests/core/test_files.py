"""Files are written whole or not at all, and what is no file stays what it is."""

import os
import subprocess
import sys

import pytest

from gdrq_mm.core.files import check_file, write_whole


def test_write_whole_replaces(tmp_path):
    write_whole(tmp_path / 'file', b'one')
    write_whole(tmp_path / 'file', b'two')
    assert (tmp_path / 'file').read_bytes() == b'two' and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands for a full disk."""
    path = tmp_path / 'file'
    path.write_bytes(b'old')
    code = (
        'import resource, signal, sys; from gdrq_mm.core.files import write_whole\n'
        'signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n'
        'write_whole(sys.argv[1], bytes(5000))'
    )
    done = subprocess.run([sys.executable, '-c', code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and 'File too large' in done.stderr
    assert path.read_bytes() == b'old' and list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way_stays(tmp_path):
    (tmp_path / 'file').mkdir()
    with pytest.raises(OSError, match='file'):
        write_whole(tmp_path / 'file', b'new')
    assert list(tmp_path.iterdir()) == [tmp_path / 'file'] and (tmp_path / 'file').is_dir()


def test_a_link_and_what_is_no_file_stay(tmp_path):
    """A rename would put a file in the place of /dev/null."""
    (tmp_path / 'real').write_bytes(b'old')
    (tmp_path / 'link').symlink_to('real')
    write_whole(tmp_path / 'link', b'new')
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'real').read_bytes() == b'new'
    os.mkfifo(tmp_path / 'pipe')
    check_file(tmp_path / 'pipe', '--out')
    reader = os.open(tmp_path / 'pipe', os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / 'pipe', b'new')
    assert (tmp_path / 'pipe').is_fifo() and os.read(reader, 9) == b'new'
    os.close(reader)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['link', 'pipe', 'real']
