"""Hooks of mkdocs: pages that docs/ does not hold, links that lead out of it, and what makes `make docs` fail.

Added are README.md as the first page, CONTRIBUTING.md, CHANGELOG.md, a reference page for each module, and a page
for each other file or folder that a page links to. A link to a module leads to its reference, one whose text is the
name of something public in it to that; one to anything else to the file.
"""

from __future__ import annotations

import ast
import logging
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
PAGES = {'README.md': 'index.md', 'CONTRIBUTING.md': 'contributing.md', 'CHANGELOG.md': 'changelog.md'}
LINK = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+://)([^)\s#]*)(#[^)\s]*)?\)')
FENCE = re.compile(r'(^```.*?^```$)', re.DOTALL | re.MULTILINE)
LANGUAGES = {'.py': 'python', '.sh': 'bash', '.cpp': 'cpp', '.md': 'markdown', '.json': 'json', '.yml': 'yaml'}
log = logging.getLogger('mkdocs.hooks.gdrq_mm')


def modules():
    """The public modules: page -> (dotted name, file). Commands have their own help, so they are no part of it."""
    found = {}
    for path in sorted((ROOT / 'gdrq_mm').rglob('*.py')):
        parts = path.relative_to(ROOT).with_suffix('').parts
        if '.mim' not in parts and 'commands' not in parts and parts[-1] != '__main__':
            name = '.'.join(parts).removesuffix('.__init__')
            found[f'reference/{name}.md'] = name, path
    return found


def on_files(files, config):
    """Add the pages that docs/ does not hold; warn, which ends a strict build, of public names without docstring."""
    from mkdocs.structure.files import File

    sources = {}
    for path, page in PAGES.items():
        sources[page] = rewritten((ROOT / path).read_text(), path, page)
    for file in [file for file in files if file.src_uri.endswith('.md')]:
        text = Path(file.abs_src_path).read_text()
        sources[file.src_uri] = rewritten(text, f'docs/{file.src_uri}', file.src_uri)
        files.remove(file)
    for page, (name, path) in modules().items():
        sources[page] = f'# {name}\n\n::: {name}\n'
        for missing in undocumented(path):
            log.warning('%s: %s has no docstring', path.relative_to(ROOT), missing)
    sources['reference/index.md'] = '# Reference\n\n' + ''.join(
        f'- [{name}]({page.removeprefix("reference/")})\n' for page, (name, _) in modules().items()
    )
    for path, page in sorted(linked.items()):
        sources[page] = shown(path)
    for page, text in sources.items():
        files.append(File.generated(config, page, content=text))
    return files


linked: dict[str, str] = {}
"""File or folder of the repository that a page links to -> its page."""


def rewritten(text, path, page):
    """The text of a page whose links are those of the site.

    Args:
        path: of the text, below the root.
        page: of the text on the site.
    """

    def replaced(match):
        mark, label, target, anchor = match.groups()
        if not target:
            return match[0]
        goal = posixpath.normpath(posixpath.join(posixpath.dirname(path), unquote(target)))
        if not (ROOT / goal).exists():
            log.warning('%s links to %s, which does not exist', path, target)
            return match[0]
        found, anchor = place_of(goal, label, anchor or '')
        return f'{mark}[{label}]({posixpath.relpath(found, posixpath.dirname(page) or ".")}{anchor})'

    parts = FENCE.split(text)
    return ''.join(part if number % 2 else LINK.sub(replaced, part) for number, part in enumerate(parts))


def place_of(goal, label, anchor):
    """Page and anchor on the site of a file or folder of the repository."""
    if goal in PAGES:
        return PAGES[goal], anchor
    inside = goal.removeprefix('docs/')
    if goal.startswith('docs/') and (ROOT / goal).is_file():
        return inside, anchor
    name = label.strip('`')
    module = next((page for page, (_, path) in modules().items() if path == ROOT / goal), None)
    if module and not re.search(r'(^|\.)_', name):
        public = name in names_of(ROOT / goal)
        return module, f'#{module.removeprefix("reference/").removesuffix(".md")}.{name}' if public else ''
    page = f'source/{goal}.md'
    linked[goal] = page
    line = names_of(ROOT / goal).get(name) if goal.endswith('.py') else None
    return page, f'#__codelineno-0-{line}' if line else anchor


def names_of(path):
    """Name -> line of what a Python file defines: functions, classes, 'Class.method', and what it assigns."""
    found = {}

    def add(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found[prefix + node.name] = node.lineno
            if isinstance(node, ast.ClassDef):
                add(node.body, f'{prefix}{node.name}.')
            for target in getattr(node, 'targets', [getattr(node, 'target', None)]):
                if isinstance(target, ast.Name):
                    found[prefix + target.id] = node.lineno

    add(ast.parse(path.read_text()).body, '')
    return found


def shown(path):
    """The page of a file, or of a folder with its files."""
    if (ROOT / path).is_dir():
        inside = sorted(p.name for p in (ROOT / path).iterdir() if p.name != '__pycache__')
        return f'# {path}/\n\n' + ''.join(f'- `{name}`\n' for name in inside)
    language = LANGUAGES.get(Path(path).suffix, 'text')
    return f'# {path}\n\n``````{{.{language} linenums="1"}}\n{(ROOT / path).read_text()}\n``````\n'


def undocumented(path):
    """Public names of a file without docstring. A method of a class with bases may have that of the base."""
    tree = ast.parse(path.read_text())
    if not ast.get_docstring(tree):
        yield 'the module'

    def visit(body, prefix, inherits):
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith(
                '_'
            ):
                marks = [ast.unparse(each) for each in node.decorator_list]
                if not ast.get_docstring(node) and not inherits and 'overload' not in marks:
                    yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from visit(node.body, f'{prefix}{node.name}.', bool(node.bases))

    yield from visit(tree.body, '', False)


class _Page(HTMLParser):
    """The ids and the links of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ('id', 'name') and value:
                self.ids.add(value)
            elif name in ('href', 'src') and value:
                self.links.add(value)


def on_post_build(config):
    """Warn of each link that leads to no page, no file or no place of a page."""
    site = Path(config['site_dir'])
    pages = {path: _Page(path.read_text()) for path in site.rglob('*.html')}
    for path, page in sorted(pages.items()):
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == '404.html':
                continue
            goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = goal in pages or goal.is_file() or (goal / 'index.html').is_file()
            ids = pages[goal].ids if goal in pages else set()
            if not there or (parts.fragment and goal in pages and unquote(parts.fragment) not in ids):
                log.warning('%s links to %s, which does not exist', path.relative_to(site), link)
