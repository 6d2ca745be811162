"""Whatever a record holds: it is refused in one line, or all outputs show it and lose none of its names."""

import copy
import io
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markupsafe import escape
from rich.console import Console

from gdrq_mm.core.errors import UserError
from gdrq_mm.report.compare import recipe_notes
from gdrq_mm.report.formats import comparison_csv, comparison_markdown, comparison_table
from gdrq_mm.report.html import html_report
from gdrq_mm.report.record import read_record
from gdrq_mm.report.text import literal, printable
from tests.records import record

NAMES = st.text(st.characters() | st.sampled_from('[]/|\\\n`*_<&\x1b\u202e'), min_size=1, max_size=12)
NUMBERS = st.one_of(
    st.floats(),
    st.sampled_from([1e308, -1e308, 5e-324, 10**400]),
    st.integers(),
    st.floats().map(str),
    st.integers().map(str),
)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A float record and two quantized ones of its model, as JSON has them."""
    file = tmp_path_factory.mktemp('base') / 'epoch_1.pth'
    torch.save(dict(state_dict={}), file)
    records = [json.loads(json.dumps(record(str(file), 92.0, quantized, seed=0))) for quantized in (False, True, True)]
    for number, found in enumerate(records):
        found['checkpoint'] = dict(file=f'{number}.pth', sha256=str(number))
        found['training'] |= dict(epoch=1, iter=10, seed=number)
    return records


def places(value, place=()):
    """The places of nested data."""
    yield place
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*place, key))


def written(folder, records):
    """The records as they are read from files; they lie in folders of their own."""
    found = []
    for number, content in enumerate(records):
        file = folder / f'{number}/record.json'
        file.parent.mkdir()
        file.write_text(json.dumps(content))
        found.append({**read_record(file), 'path': str(file)})
    return found


def outputs(records):
    console = Console(file=io.StringIO(), width=5000)
    console.print(comparison_table(records))
    texts = console.file.getvalue(), comparison_markdown(records), comparison_csv(records), html_report(records)
    for text in texts:
        text.encode()
    return texts


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_of_a_record_is_shown_or_refused_in_one_line(base, data):
    records = copy.deepcopy(base)
    for _ in range(data.draw(st.integers(1, 3))):
        found = records[data.draw(st.integers(0, 2))]
        place = data.draw(st.sampled_from([p for p in places(found) if p and p[0] != 'record_version']))
        *outer, last = place
        for key in outer:
            found = found[key]
        found[last] = data.draw(PLAIN)
    with tempfile.TemporaryDirectory() as folder:
        try:
            outputs(written(Path(folder), records))
        except UserError as error:
            assert str(error)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=NAMES, data_set=NAMES, method=NAMES, option=NAMES)
def test_names_are_in_every_output_as_they_are(base, model, data_set, method, option):
    records = copy.deepcopy(base)
    for found in records:
        found['model']['name'], found['data']['name'] = model, data_set
    records[1]['model'] |= dict(methods=[method, method], options={'weight.clip': option})
    with tempfile.TemporaryDirectory() as folder:
        read = written(Path(folder), records)
        table, marked, comma, page = outputs(read)
    rows = marked.split('\n\n')[0].splitlines()
    assert len(rows) == 4 and len({count_bars(row) for row in rows}) == 1
    for name in (model, data_set, method, option):
        shown = printable(name.encode('utf-8', 'backslashreplace').decode())
        assert literal(shown).strip() in marked and str(escape(shown)) in page
        assert shown.rstrip() in table and shown.replace('"', '""') in comma


def count_bars(row):
    """How many bars of a Markdown row are not escaped."""
    bars, escaped = 0, False
    for letter in row:
        bars += letter == '|' and not escaped
        escaped = letter == '\\' and not escaped
    return bars


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(NUMBERS, min_size=3, max_size=3), sizes=st.lists(NUMBERS, min_size=3, max_size=3), iteration=NUMBERS
)
def test_any_numbers_are_shown(base, values, sizes, iteration):
    records = copy.deepcopy(base)
    for found, value in zip(records, values, strict=True):
        found['metrics'] = {'accuracy/top1': value}
        found['model'] |= dict(zip(('float_bytes', 'bytes', 'bit_operations'), sizes, strict=True))
        found['training']['iter'] = iteration
        found['quantization'] = found['quantization'] and {**found['quantization'], 'schedule': dict(reshape=iteration)}
    with tempfile.TemporaryDirectory() as folder:
        read = written(Path(folder), records)
        assert all(texts for texts in outputs(read)) and isinstance(recipe_notes(read), list)


SCALARS = st.lists(
    st.dictionaries(
        st.sampled_from(['step', 'quant/a.weight/threshold', 'quant/b/clip_ratio', 'quant/b/threshold']),
        NUMBERS | st.integers(0, 50) | st.none() | NAMES,
    )
    | PLAIN,
    max_size=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(SCALARS, min_size=1, max_size=3))
def test_any_training_log_is_shown(base, logs):
    with tempfile.TemporaryDirectory() as folder:
        read = written(Path(folder), base)
        for number, lines in enumerate(logs):
            file = Path(folder, f'1/2026010{number}_000000/vis_data/scalars.json')
            file.parent.mkdir(parents=True)
            file.write_text('\n'.join(map(json.dumps, lines)))
        assert 'Quantization report' in html_report(read)


def test_gpus_that_are_none_are_not_recorded(base, tmp_path):
    changed = [{**each, 'hardware': dict(cpu='a', cores=2, threads=1, gpus=None)} for each in base]
    assert 'GPUs' in html_report(written(tmp_path, changed))
