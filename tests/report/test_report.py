"""The HTML report: what stands in it, and what a real browser makes of it."""

import copy
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from gdrq_mm.core.errors import UserError
from gdrq_mm.openmmlab.describe import make_record
from gdrq_mm.openmmlab.runner import QuantRunner
from gdrq_mm.report.compare import comparison_rows
from gdrq_mm.report.html import PICTURES, WIDTH, html_report, picture, pictures, sort_key
from gdrq_mm.report.html_plots import POINTS, curve_plot, sparkline, thin
from gdrq_mm.report.record import find_records, write_record
from gdrq_mm.report.train_log import QUANTITIES, read_log
from tests.helpers import ROOT
from tests.runs import TEST_ONLY, checkpoint_of, tiny_config

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
HOSTILE = '<script>alert(1)</script>&"\'$x$'
"""Must be shown as it is."""


class Page(HTMLParser):
    """The elements of a page and what can be read on it."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.hidden = [], '', False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.hidden = tag in ('script', 'style')

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        self.text += '' if self.hidden else data

    def all(self, tag, **wanted):
        return [attrs for name, attrs in self.elements if name == tag and wanted.items() <= attrs.items()]


def save_picture(file, width=40, height=30, colours=2):
    """A PNG of noise in so many colours."""
    file.parent.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, colours, (height, width, 3)) * (255 // (colours - 1))
    Image.fromarray(noise.astype(np.uint8)).save(file)


def write_test(cfg, checkpoint, work_dir, path):
    """Test a checkpoint and write its record, as tools/test.py does; returns the record."""
    cfg = copy.deepcopy(cfg)
    cfg.merge_from_dict(TEST_ONLY)
    cfg.work_dir, cfg.load_from, cfg.experiment_name = str(work_dir), checkpoint, f'{cfg.experiment_name}_test'
    runner = QuantRunner.from_cfg(cfg)
    record = make_record(cfg, checkpoint, runner.test(), runner.describe(), runner.training)
    path.parent.mkdir(exist_ok=True)
    write_record(record, path)
    return record


@pytest.fixture(scope='module')
def folder(digits_root, float_checkpoint, tmp_path_factory):
    """A float record without a work directory, a work directory, and records of another method with two seeds."""
    root = tmp_path_factory.mktemp('report')
    runs, cfg = root / 'runs', tiny_config(digits_root, root, quantization=None)
    (runs / 'w4a4').mkdir(parents=True)
    write_test(cfg, float_checkpoint, root / 'elsewhere', runs / 'float' / 'record.json')
    cfg = tiny_config(digits_root, runs / 'w4a4', epochs=2, load_from=float_checkpoint)
    cfg.custom_hooks = [dict(type='StatisticsHook', interval=3)]
    runner = QuantRunner.from_cfg(cfg)
    runner.train()
    record = write_test(cfg, checkpoint_of(runner, 'epoch_2.pth'), root / 'elsewhere', runs / 'w4a4' / 'record.json')
    for seed, top1 in enumerate((9.0, 11.0)):
        model = {**record['model'], 'methods': ['lsq', 'lsq'], 'bits': [2, 4], 'options': {'weight.clip': HOSTILE}}
        other = dict(model=model, metrics={'accuracy/top1': top1}, checkpoint=dict(file=f'{seed}.pth', sha256=None))
        training = {**record['training'], 'seed': seed}
        write_record({**record, **other, 'training': training, 'hardware': None}, runs / f'lsq_{seed}.json')
    runtime = {**record, 'model': {**record['model'], 'backend': 'onnxruntime'}, 'metrics': {'accuracy/top1': 12.5}}
    write_record(runtime, runs / 'w4a4' / 'record_onnxruntime.json')
    save_picture(runs / 'w4a4' / 'predictions.png')
    save_picture(runs / 'w4a4' / 'analysis' / 'sensitivity.png')
    save_picture(runs / 'quickstart.png')
    return runs


@pytest.fixture(scope='module')
def html(folder, run_in):
    """The report of it, as the tool writes it."""
    out = folder.parent / 'new' / 'report.html'
    (done,) = run_in(folder.parent, [{}], ROOT / 'tools/compare_results.py', folder, '--html', out)
    assert done.returncode == 0, done.stderr
    assert os.listdir(out.parent) == ['report.html']
    return out.read_text()


@pytest.fixture(scope='module')
def page(html):
    return Page(html)


def test_the_rows_are_those_of_the_table(folder, page):
    cells = {cell for row in comparison_rows(find_records([folder])) for cell in row.values()}
    assert {'GDRQ', 'W2A4', '10.00 ± 1.41', 'not run', '12.50'} <= cells and all(cell in page.text for cell in cells)
    assert len(page.all('td', **{'class': 'missing'})) == 2  # GDRQ W2A4 and LSQ W4A4
    linked = {attrs['href'] for attrs in page.all('a')}
    assert linked and linked <= {f'#{attrs["id"]}' for attrs in page.all('section')}


def test_text_of_records_is_escaped(html, page):
    assert f'LSQ (clip={HOSTILE})' in page.text  # in the table and in the legend of a plot
    assert page.text.count(HOSTILE) >= 4 and '<script>alert' not in html


def test_nothing_is_loaded_from_elsewhere(html, page):
    assert 'http' not in re.sub(r'http-equiv', '', html)
    assert not page.all('link') and all('src' not in attrs for attrs in page.all('script'))
    assert all(attrs['src'].startswith('data:image/') for attrs in page.all('img'))
    assert "default-src 'none'" in page.all('meta', **{'http-equiv': 'Content-Security-Policy'})[0]['content']
    used = re.findall(r'(?:href="|url\()#(\w+)', re.sub(r'<a .*?>', '', html))
    ids = [attrs['id'] for _, attrs in page.elements if 'id' in attrs]
    assert set(used) <= set(ids) and len(ids) == len(set(ids))


def test_plots_and_curves_are_there(page):
    labels = [attrs['aria-label'] for attrs in page.all('div', role='img')]
    assert labels == ['top-1 against size in MB', 'top-1 against bits']
    assert len(page.all('svg', **{'class': None})) == 0
    plots = [attrs for attrs in page.all('svg') if 'class' not in attrs]
    assert len(plots) == 2 + 2 * len(QUANTITIES)
    assert 'first → last' in page.text and 'backbone.layer1.0.conv1.weight' in page.text
    assert re.search(r'Read from \d+_\d+/vis_data\.', page.text)


def test_pictures_are_there(page):
    names = [attrs['alt'] for attrs in page.all('img')]
    sheets = ['distributions_0.png', 'distributions_7.png']  # the default schedule has no reshape stage
    assert names == [*sheets, 'sensitivity.png', 'predictions.png', 'quickstart.png']


def test_the_distributions_after_reshape_are_shown(folder, tmp_path):
    record = json.loads((folder / 'w4a4/record.json').read_text())
    record['quantization']['schedule'] = dict(reshape=0.4, freeze=1.0)
    write_log(tmp_path, '20260101_000000', [0, 3, 4, 7])
    for file in (tmp_path / '20260101_000000/vis_data/vis_image').iterdir():
        save_picture(file)
    assert record['training']['iter'] == 8  # so that rounding begins in iteration 4
    page = html_report([{**record, 'path': str(tmp_path / 'record.json')}])
    assert re.findall(r'Distributions at iteration (\d+)', page) == ['0', '4', '7']


def test_facts_are_those_of_the_records(folder, page):
    record = json.loads((folder / 'w4a4/record.json').read_text())
    shown = [
        record['checkpoint']['sha256'],
        record['git']['commit'],
        record['hardware']['cpu'],
        record['config']['file'],
    ]
    shown += [f'torch {record["versions"]["torch"]}', json.dumps(record['quantization'])]
    assert all(fact in page.text for fact in shown)
    assert page.text.count('Facts of') == 4  # the runtime's numbers are of the same checkpoint
    assert 'onnxruntime' in page.text


def test_what_is_missing_says_so(page):
    assert page.text.count('No training log beside this record.') == 3
    hardware = re.search(r'processor\s*not recorded\s*cores, threads\s*not recorded\s*GPUs\s*not recorded', page.text)
    assert hardware and re.search(r'SHA-256 of the checkpoint\s*not recorded', page.text)


def test_a_missing_baseline_is_not_drawn(folder):
    text = Page(html_report(find_records([folder / 'w4a4']))).text
    assert 'the float baseline was not run, so none is drawn' in text and 'nan' not in text.split('Runs')[0]


def test_a_work_directory_is_shown_once(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'runs')
    shutil.copy(tmp_path / 'runs/w4a4/record.json', tmp_path / 'runs/w4a4/second.json')
    page = Page(html_report(find_records([tmp_path / 'runs']), [tmp_path / 'runs']))
    assert page.text.count('Read from') == 1 and page.text.count('with another of its records') == 1


def test_records_that_are_not_comparable_are_refused(folder):
    records = find_records([folder])
    other = {**records[0], 'checkpoint': dict(file='other.pth', sha256='0' * 64)}
    with pytest.raises(UserError, match='not comparable'):
        html_report([*records, other])


def test_a_model_that_only_a_runtime_tested_has_a_row(folder):
    record = json.loads((folder / 'w4a4/record_onnxruntime.json').read_text())
    page = Page(html_report([record]))
    assert '12.50' in page.text and not page.all('div', role='img')


# ---- training logs --------------------------------------------------------------------------------------------------


def write_log(work_dir, name, steps, more=''):
    folder = work_dir / name / 'vis_data'
    (folder / 'vis_image').mkdir(parents=True)
    lines = [json.dumps({'quant/a/b.weight/threshold': float(step), 'loss': 1.0, 'step': step}) for step in steps]
    (folder / 'scalars.json').write_text('\n'.join(['{"loss": 1.0, "step": 1}', *lines]) + '\n' + more)
    for step in steps:
        (folder / 'vis_image' / f'distributions_{step}.png').touch()


def test_a_resumed_training_goes_on_in_the_curve(tmp_path):
    write_log(tmp_path, '20260101_000000', [499, 999, 1499])
    write_log(tmp_path, '20260102_000000', [999, 1499, 1999])
    log = read_log(tmp_path)
    assert log.curves()['a/b.weight']['threshold'] == [(s, float(s)) for s in (499, 999, 1499, 1999)]
    assert [log.sources[step][:8] for step in (499, 999)] == ['20260101', '20260102']
    assert '20260102' in str(log.sheets[999])
    write_log(tmp_path, '20260103_000000', [499])
    assert list(read_log(tmp_path).steps) == [499] == list(read_log(tmp_path).sheets)


@pytest.mark.parametrize(
    ('runs', 'expected'),
    [
        # in the order in which they were made; the number is the day that the clock showed
        ([(2, [499, 999]), (1, [1499, 1999])], [499, 999, 1499, 1999]),
        ([(2, [499, 999, 1499]), (1, [999, 1499, 1999])], [499, 999, 1499, 1999]),
        ([(1, [499, 999]), (3, [1499, 1999]), (2, [2499, 2999])], [499, 999, 1499, 1999, 2499, 2999]),
        ([(3, [499, 999]), (2, [1499, 1999]), (1, [2499])], [499, 999, 1499, 1999, 2499]),
        ([(1, [499, 999]), (2, [499])], [499]),  # a new training, no clock was set back
        ([(1, [499]), (2, [1999, 2499]), (3, [499])], [499]),  # there was a gap, then a new training
    ],
)
def test_a_clock_that_was_set_back_loses_no_part_of_a_curve(tmp_path, runs, expected):
    for day, steps in runs:
        write_log(tmp_path, f'2026010{day}_000000', steps)
    log = read_log(tmp_path)
    assert list(log.steps) == expected == sorted(log.sheets)
    last_day, last_steps = runs[-1]
    assert log.sources[last_steps[-1]] == f'2026010{last_day}_000000/vis_data'


def test_a_curve_with_values_that_cannot_be_drawn_says_so(folder, tmp_path):
    record = json.loads((folder / 'w4a4/record.json').read_text())
    write_log(tmp_path, '20260101_000000', [0, 3])
    lines = [
        {'quant/a.weight/threshold': value, 'step': 4 + n} for n, value in enumerate((1e308, -1e308, float('nan')))
    ]
    lines += [{'quant/b/threshold': float('inf'), 'step': 4}]
    with open(tmp_path / '20260101_000000/vis_data/scalars.json', 'a') as file:
        file.write('\n'.join(map(json.dumps, lines)) + '\n')
    page = html_report([{**record, 'path': str(tmp_path / 'record.json')}])
    assert 'threshold: 3 values that are not finite or too large are not drawn' in page
    assert '1e+308' in page


def test_damaged_lines_are_left_out_and_counted(tmp_path):
    damaged = [
        '{"quant/a/threshold": 1.0, "st',
        '{"quant/a/threshold": 1.0}',
        '{"quant/a/threshold": "x", "step": 3}',
        '\0',
        '{"quant/a/threshold": 1.0, "step": Infinity}',
        '{"quant/a/threshold": 1.0, "step": 1e300}',
        '{"quant/a/threshold": 1.0, "step": -1}',
    ]
    write_log(tmp_path, '20260101_000000', [499], '\n'.join(damaged))
    log = read_log(tmp_path)
    assert (list(log.steps), log.damaged) == ([499], 6)
    assert read_log(tmp_path / 'none') is None


def test_the_learning_rate_is_read_beside_the_statistics(tmp_path):
    rates = [json.dumps(dict(lr=0.1 / step, loss=1.0, step=step)) for step in (499, 999)]
    write_log(tmp_path, '20260101_000000', [499, 999], '\n'.join([*rates, '{"lr": 0.1, "st', '{"lr": "x", "step": 3}']))
    write_log(tmp_path, '20260102_000000', [999], '{"lr": 7, "step": 999}')
    log = read_log(tmp_path)
    assert log.rates == {499: 0.1 / 499, 999: 7.0} and not log.damaged


def test_thresholds_and_learning_rate_have_one_axis_of_iterations():
    curves = {'a': [(0, 1.0), (500, 2.0)]}
    rates = [(step, 0.1) for step in range(0, 1000, 10)]
    alone, both = curve_plot(curves, 'threshold', 'x'), curve_plot(curves, 'threshold', 'x', rates)
    assert 'learning rate' in both and 'learning rate' not in alone
    ticks = [re.findall(r'>(\d+)</text>', plot) for plot in (alone, both)]
    assert max(map(int, ticks[0])) <= 500 and ticks[1].count('900') == 1  # as far as the rate, written below it alone


def test_long_curves_are_thinned():
    points = [(step, float(step)) for step in range(1000)]
    assert thin(points[:3]) == points[:3]
    assert len(thin(points)) == POINTS and thin(points)[0] == points[0] and thin(points)[-1] == points[-1]
    assert sparkline([(1, 2.0), (2, float('nan'))]) == '' and '1.0,8.0' not in sparkline([(1, 2.0), (2, 3.0)])


# ---- pictures and keys ----------------------------------------------------------------------------------------------


def test_large_pictures_are_made_smaller(tmp_path):
    save_picture(tmp_path / 'small.png')
    save_picture(tmp_path / 'large.png', 2 * WIDTH, 300, 256)
    small, large = picture(tmp_path / 'small.png'), picture(tmp_path / 'large.png')
    assert small.source.startswith('data:image/png') and small.note == ''
    assert large.source.startswith('data:image/webp') and large.note == f'scaled down from {2 * WIDTH} x 300 pixels'
    assert len(large.source) < (tmp_path / 'large.png').stat().st_size / 4


@pytest.mark.parametrize('data', [b'', b'no picture', None])
def test_a_damaged_picture_says_so(tmp_path, data):
    save_picture(tmp_path / 'a.png', 200, 200, 256)
    (tmp_path / 'a.png').write_bytes((tmp_path / 'a.png').read_bytes()[:5000] if data is None else data)
    assert 'cannot be read' in picture(tmp_path / 'a.png').note


def test_a_name_that_is_no_unicode_is_shown(folder, tmp_path):
    """As archives of other systems leave it."""
    place = tmp_path / os.fsdecode(b'runs\xff')
    shutil.copytree(folder, place)
    save_picture(place / os.fsdecode(b'gr\xfcn.png'))
    html = html_report(find_records([place]), [place])
    assert html.encode() and 'gr\\udcfcn.png' in html and 'runs\\udcff' in html


def test_so_many_pictures_are_shown(tmp_path):
    for number in range(PICTURES + 2):
        save_picture(tmp_path / f'{number:03}.png', 2, 2)
    found = pictures(tmp_path.glob('*.png'))
    assert len(found) == PICTURES + 1 and (found[-1].name, found[-1].note) == ('2 more', 'not shown')


@pytest.mark.parametrize(
    'column, cell, key',
    [
        ('quantized', '91.50 ± 0.50', '91.50'),
        ('drop', '-0.40', '-0.40'),
        ('quantized', 'not run', ''),
        ('size in MB', '12.68 → 1.62', '1.62'),
        ('bits', 'W4A8', '408'),
        ('published', '76.9 (a 2020 paper)', '76.9'),
        ('model', 'ResNet-18', 'ResNet-18'),
        ('drop', '', ''),
    ],
)
def test_what_a_cell_is_sorted_by(column, cell, key):
    assert sort_key(column, cell) == key


# ---- a real browser -------------------------------------------------------------------------------------------------

LISTEN = """<script>
const errors = [];
addEventListener('error', event => errors.push(event.message));
addEventListener('securitypolicyviolation', event => errors.push(event.violatedDirective));
console.error = console.warn = text => errors.push(text);
</script>"""
PROBE = """<script>
addEventListener('load', () => {
  const wide = () => document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const button = name => [...document.querySelectorAll('#comparison button')].find(b => b.textContent === name);
  const column = name => {
    const place = button(name).closest('th').cellIndex;
    return [...document.querySelectorAll('#comparison tbody tr')].map(row => row.cells[place].textContent);
  };
  const sorted = name => { button(name).click(); return column(name); };
  const found = {width: innerWidth, closed: wide()};
  found.sorts = ['quantized', 'quantized', 'bits', 'method'].map(sorted);
  found.aria = button('method').closest('th').getAttribute('aria-sort');
  for (const details of document.querySelectorAll('details')) details.open = true;
  found.open = wide();
  found.images = [...document.images].map(image => image.naturalWidth);
  found.plots = [...document.querySelectorAll('.plots svg')].map(svg => svg.getBoundingClientRect().width);
  found.loaded = performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'));
  parent.postMessage(JSON.stringify({...found, errors}), '*');
});
</script>"""
FRAME = """<!doctype html><iframe src="page.html" width="{width}" height="900"></iframe><pre></pre><script>
addEventListener('message', event => document.querySelector('pre').textContent = event.data);
</script>"""
"""Chromium opens no window as narrow as a telephone: the page is shown in a frame."""


@pytest.mark.skipif(BROWSER is None, reason=f'no browser: none of {", ".join(BROWSERS)} is installed')
@pytest.mark.parametrize('width', [1280, 420])
def test_the_page_in_a_browser(html, tmp_path, width):
    probed = html.replace('<meta charset="utf-8">', '<meta charset="utf-8">' + LISTEN).replace(
        '</body>', PROBE + '</body>'
    )
    (tmp_path / 'page.html').write_text(probed)
    (tmp_path / 'frame.html').write_text(FRAME.format(width=width))
    flags = '--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --enable-logging=stderr --dump-dom'.split()
    flags += ['--virtual-time-budget=10000', '--window-size=1400,1000', f'--user-data-dir={tmp_path / "profile"}']
    command = [BROWSER, *flags, (tmp_path / 'frame.html').as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert 'CONSOLE' not in done.stderr
    found = json.loads(Page(done.stdout).text)
    assert found['width'] == width and found['errors'] == [] and found['loaded'] == []
    assert max(found['closed'], found['open']) <= 0  # nothing wider than the page
    assert min(found['images']) > 0 and min(found['plots']) > 0.6 * min(width, 400)
    up, down, bits, methods = found['sorts']
    numbers = [float(text.split()[0]) for text in up[:2]]
    assert numbers == sorted(numbers) and down[:2] == up[1::-1]
    assert up[2:] == down[2:] == ['not run', 'not run']
    assert bits == ['W2A4', 'W2A4', 'W4A4', 'W4A4']
    assert methods[0] == methods[1] == 'GDRQ' and found['aria'] == 'ascending'
