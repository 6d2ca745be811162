"""README and docs: links, files, names and sections exist; tables are what the records give."""

import ast
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT

PAGES = [*ROOT.glob('*.md'), *sorted((ROOT / 'docs').glob('*.md'))]
LINK = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!http)([^)\s]+)\)')
FOLDERS = 'gdrq_mm|configs|tools|tests|benchmarks|examples|docs'


def prose(page):
    """The text of a page without blocks of code."""
    return re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)


def anchors(page):
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r'^#+ (.*)$', prose(page), re.MULTILINE)
    return [re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-') for heading in headings]


def defined(path):
    """Names that a Python file defines: functions, classes, 'Class.method', and what it assigns."""
    names = set()

    def add(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                add(node.body, f'{prefix}{node.name}.')
            for target in getattr(node, 'targets', [getattr(node, 'target', None)]):
                if isinstance(target, ast.Name):
                    names.add(prefix + target.id)

    add(ast.parse(path.read_text()).body, '')
    return names


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for _, _, target in LINK.findall(prose(page)):
        name, _, anchor = target.partition('#')
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_a_link_that_names_a_function_leads_to_it(page):
    for _, text, target in LINK.findall(prose(page)):
        if target.endswith('.py') and re.fullmatch(r'`[\w.]+`', text) and not text.endswith('.py`'):
            assert text.strip('`') in defined(page.parent / target), f'{text} is not in {target}'


def test_method_links_a_function_to_every_section():
    sections = re.split(r'^## ', prose(ROOT / 'docs/method.md'), flags=re.MULTILINE)[1:]
    assert [section.split('.')[0] for section in sections] == ['1', '2', '3', '4', '5', '6', '7', '8']
    for section in sections:
        assert '.py)' in section, section.splitlines()[0]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    """Paths in backticks and in blocks of commands; capital letters stand for a name that the reader gives."""
    code = re.findall(r'```bash\n(.*?)```', page.read_text(), re.DOTALL) + re.findall(r'`([^`]+)`', prose(page))
    found = [path for text in code for path in re.findall(rf'(?<![\w/.])((?:{FOLDERS})/[^\s#\'"\]]*)', text)]
    for path in found:
        if not re.search(r'[A-Z]{2}', path):
            assert list(ROOT.glob(path.rstrip('/.'))), path


def test_the_code_cites_sections_that_exist():
    sections = re.findall(r'^## (\d)\.', (ROOT / 'docs/method.md').read_text(), re.MULTILINE)
    cited = set()
    for file in (*(ROOT / 'gdrq_mm').rglob('*.py'), *(ROOT / 'tests').rglob('*.py')):
        for listed in re.findall(r'docs/method\.md, sections? ([\d, and]+)', file.read_text()):
            cited.update(re.findall(r'\d', listed))
    assert cited and cited <= set(sections)


# ---- the site: make docs --------------------------------------------------------------------------------------------


@pytest.fixture
def hooks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'docs/site')
    return pytest.importorskip('hooks')


def test_all_that_is_public_has_a_docstring(hooks, tmp_path):
    assert [(page, name) for page, (_, path) in hooks.modules().items() for name in hooks.undocumented(path)] == []
    (tmp_path / 'a.py').write_text('def f():\n    pass\nclass A:\n    """A."""\n    def g(self):\n        pass\n')
    assert [*hooks.undocumented(tmp_path / 'a.py')] == ['the module', 'f', 'A.g']
    (tmp_path / 'a.py').write_text(
        '"""A."""\nclass _B:\n    pass\nclass B(_B):\n    """B."""\n    def g(self):\n        pass\n'
    )
    assert [*hooks.undocumented(tmp_path / 'a.py')] == []  # the base may say it


@pytest.mark.parametrize(
    ('path', 'link', 'expected'),
    [
        ('docs/a.md', '[x](speed.md#here)', '[x](speed.md#here)'),
        ('docs/a.md', '[x](../README.md)', '[x](index.md)'),
        ('README.md', '![x](docs/figures/digits.png)', '![x](figures/digits.png)'),
        (
            'docs/a.md',
            '[`clip`](../gdrq_mm/core/functional.py)',
            '(reference/gdrq_mm.core.functional.md#gdrq_mm.core.functional.clip)',
        ),
        ('docs/a.md', '[config](../gdrq_mm/core/config.py)', '[config](reference/gdrq_mm.core.config.md)'),
        ('docs/a.md', '[x](../examples/detect.py)', '[x](source/examples/detect.py.md)'),
        ('docs/a.md', '```\n[x](none.md)\n```', '[x](none.md)'),
    ],
)
def test_links_of_the_site(hooks, path, link, expected, caplog):
    assert expected in hooks.rewritten(link, path, hooks.PAGES.get(path, 'a.md')) and not caplog.records


def test_dead_links_of_the_site_are_told(hooks, tmp_path, caplog):
    hooks.rewritten('[x](none.md)', 'docs/a.md', 'a.md')
    (tmp_path / 'a.html').write_text('<a href="b.html#one">x</a><a href="b.html#two">x</a><img src="c.png"><p id="p">')
    (tmp_path / 'b.html').write_text('<h1 id="one"></h1><a href="a.html#p"></a><a href="http://x.org/y">z</a>')
    hooks.on_post_build(dict(site_dir=str(tmp_path)))
    told = [record.getMessage() for record in caplog.records]
    links = ['docs/a.md links to none.md', 'a.html links to b.html#two', 'a.html links to c.png']
    assert told == [f'{link}, which does not exist' for link in links]


@pytest.mark.full
def test_the_site_is_built(tmp_path):
    pytest.importorskip('mkdocs')
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet', '-d', tmp_path / 'site']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        'gdrq_mm.core.functional.fake_quantize'
        in (tmp_path / 'site/reference/gdrq_mm.core.functional.html').read_text()
    )


def test_readme_fits_a_few_screens():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 180


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_nothing_is_measured_against_a_goal_or_cites_a_page_that_is_not_here(page):
    for line in page.read_text().splitlines():
        assert not re.search(r'\baims?\b|METHOD\.md|figures\.md', line), line


def test_every_table_is_known_and_used():
    known = re.findall(r'<!-- table: (\w+) -->', ''.join(page.read_text() for page in PAGES))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'benchmarks')
        import tables
    assert sorted(known) == sorted(tables.TABLES)


def test_tables_are_what_the_records_give():
    command = [sys.executable, str(ROOT / 'benchmarks/tables.py'), '--check']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
