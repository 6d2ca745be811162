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
    assert [section.split('.')[0] for section in sections] == ['1', '2', '3', '4', '5', '6', '7']
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
