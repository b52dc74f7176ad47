"""
What the test files share: where the project lies, seeds, commands, tensors compared, and small data
and runs.
"""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # more threads slow tiny models down

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

hypothesis.settings.register_profile('plain', deadline=None, derandomize=True, database=None,
    max_examples=25, suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile('plain')

EXTRAS = {'test_huggingface.py': 'transformers', 'test_sample.py': 'sacrebleu'}
collect_ignore = [file for file, package in EXTRAS.items() if not importlib.util.find_spec(package)]

def pytest_report_header():
    return [f'{file} is left out: pip install -r tests/requirements.txt' for file in collect_ignore]

def pytest_configure(config):
    config.addinivalue_line('markers', 'gpu: needs a GPU; deselected where there is none')

def pytest_collection_modifyitems(config, items):
    """Without a GPU its tests are deselected, not skipped: a skip would hide what is missing."""
    if not torch.cuda.is_available():
        gpu = [item for item in items if item.get_closest_marker('gpu')]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]

@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    """Draws and signals as at the start (nohup ignores some, a run notes them), and no pictures."""
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    torch.manual_seed(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (stop for stop in signal.Signals if stop.name in ('SIGTERM', 'SIGHUP')):
        signal.signal(number, signal.SIG_DFL)

@pytest.fixture(scope='session')
def shared():
    """The folder of real texts beside the project; without it, the tests that need it skip."""
    folder = Path(os.environ.get('PLAINFORMER_SHARED', ROOT.parent / 'shared'))
    if not (folder / 'data').is_dir():
        pytest.skip('needs the folder shared/ beside the project, or PLAINFORMER_SHARED')
    return folder

# -----------------------------------------------------------------------------
# Commands and errors

def command(script, *flags, cwd, status=0, **kwargs):
    """Run `python script flags...` in cwd as a user would; returns the finished process."""
    result = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], cwd=cwd,
                            capture_output=True, encoding='utf-8', timeout=300, **kwargs)
    assert result.returncode == status, (
        f'{script} {flags} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}')
    return result

def refused(script, *flags, cwd, **kwargs):
    """Run a command that has to end with status 2 and one line on stderr; returns that line."""
    lines = command(script, *flags, cwd=cwd, status=2, **kwargs).stderr.strip().splitlines()
    assert len(lines) == 1, '\n'.join(lines)
    return lines[0]

def one_line(kind, call, *args, **kwargs):
    """The message of the exception of a kind that a call raises, which must be one line."""
    with pytest.raises(kind) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert message and '\n' not in message, f'not one line: {message}'
    return message

# -----------------------------------------------------------------------------
# Models and tensors

def tiny(preset, **changes):
    """A row of PRESETS at a size that takes milliseconds, without dropout."""
    from model import PRESETS
    c = PRESETS[preset]
    sizes = dict(vocab_size=50, block_size=16, n_layer=2, n_head=4, n_embd=32, dropout=0.0,
        n_kv_head=min(c.n_kv_head, 4), head_dim=min(c.head_dim, 12), mlp_dim=min(c.mlp_dim, 40))
    return replace(c, **{**sizes, **changes})

def awake(model):
    """Give all weights random values, so that none is 0 or 1. Returns the model without dropout."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if 'norm' in name and name.endswith('weight') else 0.0, 0.25)
    return model.eval()

def close(a, b, tolerance=1e-5):
    """Equal up to rounding, relative to the largest value where that is above 1."""
    difference = (a - b).abs().max().item() if a.numel() else 0.0
    allowed = tolerance * max(1.0, b.abs().max().item() if b.numel() else 0.0)
    assert a.shape == b.shape, f'{tuple(a.shape)} and {tuple(b.shape)}'
    assert difference <= allowed, f'differ by {difference:.2e}, allowed {allowed:.0e}'

def same(a, b):
    """Equal bit for bit."""
    assert a.shape == b.shape, f'{tuple(a.shape)} and {tuple(b.shape)}'
    assert torch.equal(a, b), f'{(a != b).sum()} of {a.numel()} values differ'

def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

# -----------------------------------------------------------------------------
# Data and runs that take a moment

DECODER_ONLY = ['gpt2', 'palm', 'llama', 'nano', 'lstm']
TINY = dict(preset='gpt2', n_layer=1, n_embd=16, n_head=2, mlp_dim=32, block_size=8, dropout=0.0,
            device='cpu', dtype='float32', batch_size=4, max_iters=6, warmup_iters=2, eval_iters=2,
            eval_interval=1000, log_interval=1000, sample_tokens=0, optimizer='adamw',
            learning_rate=2e-3, seed=5)
WIDE = dict(TINY, block_size=40)  # labelled examples and pairs of sentences fit into it
SMALL_PRESETS = ('transformer', 'bert', 'gpt2', 't5', 'palm', 'llama', 'nano', 'lstm')
ALL = [('d', 'causal_lm'), ('text', 'masked_lm'), ('classify', 'masked_lm'),
       ('text', 'span_corruption'), ('classify', 'supervised'), ('tag', 'supervised'),
       ('qa', 'supervised'), ('seq2seq', 'text_to_text'), ('seq2seq', 'completion')]

# Documents A to H of sentences like 'C07 fox.', one a line: each tells where it is from
SENTENCES = {name: [f'{name}{i:02} fox.\n' for i in range(3 + 4 * k)]
             for k, name in enumerate('ABCDEFGH')}
DOCUMENTS = [''.join(sentences) for sentences in SENTENCES.values()]
CHARS = ''.join(f'{i}. 狐狸 jumps, e\u0301t 🦊 {i * i}\n' for i in range(60))
NAMES = ('Ann', 'Lee 春')
ROWS = {
    'classify': '\n'.join(f'{["bad", "好"][i % 2]}\t{i} {"x" * (i * 7 % 30)}' for i in range(42)),
    'tag': '\n\n'.join(f'{i}{"x" * (i % 7)} O\nAnn B-name\n{["naps O", "Lee I-name"][i % 2]}\n犬 O'
                       for i in range(24)),
    'qa': json.dumps({'data': [{'paragraphs': [{'context': f'{i} {name} 犬', 'qas': [
        {'id': str(i), 'question': 'who', 'answers': [{'text': name, 'answer_start': len(f'{i} ')}]}
    ]}]} for i, name in enumerate(NAMES * 8)]}),
    'seq2seq': '\n'.join(f'{"x" * (i * 5 % 20)} {i}\t{i} {i * i}' for i in range(42))}

def prepared(folder, text, val=None, **flags):
    """A data folder of a text, validated on the same text where there is no other."""
    import prepare_data
    for split, content in (('train', text), ('val', text if val is None else val)):
        Path(f'{folder}.{split}.txt').write_text(content, encoding='utf-8', newline='\n')
    prepare_data.prepare(prepare_data.Settings(
        input=[f'{folder}.train.txt'], val=[f'{folder}.val.txt'], out_dir=str(folder), **flags))
    return str(folder)

@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    """d: characters of one document; text: bytes of several; and one folder for each task."""
    root = tmp_path_factory.mktemp('data')
    prepared(root / 'd', CHARS, CHARS[:400], tokenizer='char')
    train_text, val_text = map('<|endoftext|>\n'.join, (DOCUMENTS, DOCUMENTS[:3]))
    prepared(root / 'text', train_text, val_text, tokenizer='byte')
    for task, rows in ROWS.items():
        prepared(root / task, rows, task=task, tokenizer='byte', block_size=40)
    return root

@pytest.fixture(scope='session')
def d(folders):
    return str(folders / 'd')

def as_words(flags):
    return [f'--{name}={value}' for name, value in flags.items()]

def main(flags, status=0):
    """The command, in this process."""
    import train
    try:
        train.main(as_words(flags))
    except SystemExit as e:
        assert e.code == status

def fit(out, dataset=None, **flags):
    """Train as the command does; on resume with no flags but these. Returns ckpt.pt."""
    base = {} if flags.get('init_from') in ('resume', 'auto') else {**TINY, 'dataset': dataset}
    main({**base, 'out_dir': out, **flags})
    return read(out)

def read(out, name='ckpt.pt'):
    return torch.load(Path(out, name), weights_only=True)

def log_of(out):
    with open(Path(out, 'log.csv'), encoding='utf-8') as f:
        return list(csv.DictReader(f))

def different(a, b):
    """The names of the weights of two checkpoints that are not equal bit for bit."""
    a, b = a['model'], b['model']
    return {name for name in a.keys() | b.keys() if not torch.equal(a[name], b[name])}

def same_run(a, b):
    """Two out folders hold the same run, bit for bit; only seconds and folder may differ."""
    assert [{**row, 'seconds': ''} for row in log_of(a)] == [
        {**row, 'seconds': ''} for row in log_of(b)]
    for name in ('ckpt.pt', 'best.pt'):
        one, two = read(a, name), read(b, name)
        assert not different(one, two)
        assert {**one['progress'], 'seconds': 0} == {**two['progress'], 'seconds': 0}
        assert one.get('scaler') == two.get('scaler')
        states = [[t for o in c.get('optimizer', []) for p in o for t in p] for c in (one, two)]
        assert len(states[0]) == len(states[1])
        assert all(torch.equal(t, u) for t, u in zip(*states)), 'the optimizer differs'
