"""
Whatever happens to a run, it can go on, and ends as if nothing had happened: signals while it evaluates, a kill between two
renames, a full disk, files that vanish under it, damaged checkpoints. And whatever is fed to the scripts, they work or say
in one line why not: command lines and files are drawn here by the hundred, by the thousand with PLAINFORMER_FUZZ=5000 in the
environment. Run under torchrun, this file itself is one of two processes (see signalled_runs).
"""

import contextlib
import copy
import csv
import dataclasses
import datetime
import io
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import traceback
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, note, settings
from hypothesis import strategies as st

import model as models
import prepare_data
import sample
import train

TEXT = ''.join(f'{i}. The quick brown 狐狸 jumps over {i * i} lazy 犬, e\u0301t 🦊 naps.\n' for i in range(40))
BOOKS = '<|endoftext|>\n'.join(''.join(f'{name} {i} 🦊\n' for i in range(9)) for name in ('Ann', 'e\u0301', '春夏'))
ROWS = {  # of each task, as people write them
    'classify': ''.join(f'{["bad", "好"][i % 2]}\t{i} Ann {"x" * (i % 7)}\n' for i in range(20)),
    'tag': ''.join(f'{i} O\nAnn B-name\n{["naps O", "Lee I-name"][i % 2]}\n犬 O\n\n' for i in range(20)),
    'qa': json.dumps({'data': [{'paragraphs': [{'context': f'{i} Ann 犬', 'qas': [
        {'id': i, 'question': 'who', 'answers': [{'text': 'Ann', 'answer_start': len(f'{i} ')}]}]}]} for i in range(20)]}),
    'seq2seq': ''.join(f'{word} 二\t{n}\n' for n, word in enumerate('one two three four five six seven eight'.split())),
}
TINY = dict(n_layer=1, n_embd=16, n_head=2, mlp_dim=32, block_size=32, device='cpu', dtype='float32', batch_size=4,
            eval_iters=2, eval_interval=3, log_interval=1000, sample_tokens=0, max_iters=8, warmup_iters=2, dropout=0.2,
            optimizer='adamw', learning_rate=2e-3, seed=5)  # whatever the recipes say
RUNS = {'gpt2': 'text', 'bert': 'books', 'llama': 'text', 't5': 'books', 'classify': 'classify', 'tag': 'tag', 'qa': 'qa',
        'seq2seq': 'seq2seq', 'completion': 'seq2seq'}  # name: data set
PRESET = {'classify': 'bert', 'tag': 'bert', 'qa': 'bert', 'seq2seq': 'transformer', 'completion': 'gpt2'}
DRAWS = int(os.environ.get('PLAINFORMER_FUZZ', 100))
MAINS = {'train.py': train.main, 'sample.py': sample.main, 'prepare_data.py': prepare_data.main}


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    """No pictures, no network, no waiting for the disk, which only a power cut would show; and one thread."""
    monkeypatch.setattr(train.Log, 'plot', lambda log: None)  # drawing would take most of the time
    monkeypatch.setattr(prepare_data.urllib.request, 'urlopen', offline)
    monkeypatch.setattr(prepare_data.tiktoken, 'get_encoding', offline)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    monkeypatch.setattr(os, 'fsync', lambda f: None)
    torch.set_num_threads(1)  # sums round alike


def offline(*args, **kwargs):
    raise OSError('no network')


def words(flags):
    return [f'--{key}={value}' for key, value in flags.items()]


def ended(script, argv, stdin=b''):
    """
    (exit status, standard output, standard error) of `python script argv`: in a process forked from this one, which spares
    the import of torch, and which may crash. A status below 0 is the signal that killed it: SIGPROF or SIGALRM where it was
    busy, or waited, for too long.
    """
    pipes = [os.pipe() for _ in range(3)]
    if not (pid := os.fork()):
        status = 1
        try:
            signal.setitimer(signal.ITIMER_PROF, 20)  # seconds of work, however busy the machine is with others
            signal.alarm(200)
            if sys.platform == 'linux':  # and not all the memory that there is
                pages = int(Path('/proc/self/statm').read_text().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (3 << 30),) * 2)
            sys.argv, sys.stdin = [script, *argv], open(pipes[0][0], encoding='utf-8')
            sys.stdout, sys.stderr = (open(w, 'w', encoding='utf-8', errors='replace') for _, w in pipes[1:])
            warnings.showwarning = lambda *about: sys.stderr.write(warnings.formatwarning(*about[:4]))
            for end in (pipes[0][1], pipes[1][0], pipes[2][0]):
                os.close(end)
            prepare_data.run(MAINS[script])
            status = 0
        except SystemExit as e:
            status = e.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    for end in (pipes[0][0], pipes[1][1], pipes[2][1]):
        os.close(end)
    with open(pipes[0][1], 'wb') as f:
        f.write(stdin)
    texts = [open(r, encoding='utf-8', errors='replace').read() for r, _ in pipes[1:]]
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), *texts


def refused(script, argv):
    """The one line on standard error with which a script ends, its status being 2."""
    status, out, err = ended(script, argv)
    assert status == 2 and err.startswith(f'{script}: error: ') and err.count('\n') == 1, f'{status}\n{out}\n{err}'
    return err


def fit(folder, out, **flags):
    """What train.py says where all goes well; a run that goes on gets only the flags given here."""
    base = {} if flags.get('init_from') in ('resume', 'auto') else {**TINY, 'dataset': folder}
    status, said, err = ended('train.py', words({**base, 'out_dir': out, **flags}))
    assert status == 0, f'{status}\n{said}\n{err}'
    return said


def read(path):
    return torch.load(path, weights_only=True)


def unlike(a, b, at=''):
    """Where two trees of tensors and plain data are not bit for bit the same, but for what time and place make of them."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = (a.keys() | b.keys()) - {'seconds', 'out_dir', 'init_from', 'lr'}  # of an optimizer: set before each step
        return [name for key in keys for name in unlike(a.get(key), b.get(key), f'{at}/{key}')]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [name for i, (x, y) in enumerate(zip(a, b)) for name in unlike(x, y, f'{at}/{i}')]
    same = type(a) is type(b) and (torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b)
    return [] if same else [at]


def log_rows(out):
    """log.csv, without the seconds."""
    with open(Path(out) / 'log.csv', newline='', encoding='utf-8') as f:
        return [row[:-1] for row in csv.reader(f)]


def assert_same_end(out, whole):
    """Both runs have left the same checkpoint, best checkpoint and log; and nothing half-written."""
    for name in ('ckpt.pt', 'best.pt'):
        assert unlike(read(out / name), read(whole / name)) == [], f'{name} is another one'
    assert log_rows(out) == log_rows(whole)
    assert not list(out.glob('*.tmp')), 'half a file was left'

# -----------------------------------------------------------------------------
# What runs, and what is drawn from: data folders, checkpoints and Hugging Face folders of all kinds


def prepare(folder, text, name='text', tokenizer='byte', **flags):
    """A data folder of a made-up text."""
    path = folder.with_name(f'{folder.name}.{name}')
    path.write_text(text, encoding='utf-8', newline='\n')
    prepare_data.prepare(prepare_data.Settings(input=[str(path)], tokenizer=tokenizer, block_size=32, out_dir=str(folder),
                                               **flags))
    return str(folder)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """data/NAME, runs/NAME with a checkpoint of two steps each, and hf/NAME: all that a stranger could send."""
    root = tmp_path_factory.mktemp('world')
    for name in ('data', 'runs', 'hf'):
        (root / name).mkdir()
    prepare(root / 'data/text', TEXT)
    prepare(root / 'data/books', BOOKS)
    for task, text in ROWS.items():
        prepare(root / 'data' / task, text, name='rows', task=task, val=[f'{root}/data/{task}.rows'])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Log, 'plot', lambda log: None)
        for name, dataset in RUNS.items():
            flags = {**TINY, 'max_iters': 2, 'eval_interval': 2, 'dataset': root / 'data' / dataset,
                     'preset': PRESET.get(name, name), 'out_dir': root / 'runs' / name}
            status, _, err = ended('train.py', words(flags))
            assert status == 0, err
            if name in models.FAMILIES:
                status, _, err = ended('sample.py', ['--out_dir', str(root / 'runs' / name), '--export',
                                                     str(root / 'hf' / name)])
                assert status == 0, err
    return root


@pytest.fixture(scope='module')
def unbroken(world):
    """unbroken(dataset, flags): the out folder of a run that nobody disturbed; each is run once."""
    done = {}

    def run(dataset, **flags):
        name = ','.join([dataset, *words(flags)])
        if name not in done:
            done[name] = world / f'unbroken {len(done)}'
            fit(world / 'data' / dataset, done[name], **flags)
        return done[name]

    return run

# -----------------------------------------------------------------------------
# A signal while the run evaluates


CASES = {  # the data, the flags, and what an evaluation calls, so many times
    'causal_lm': ('text', dict(preset='gpt2'), 'evaluating', 2),
    'masked_lm': ('books', dict(preset='bert'), 'evaluating', 2),
    'classify': ('classify', dict(preset='bert'), 'evaluating', 2),
    'bleu': ('seq2seq', dict(preset='transformer', best_by='bleu'), 'write_targets', 1),
    'the whole split': ('text', dict(preset='llama', target_loss=100.0), 'evaluating', 3),  # reached at once
}


def signal_at(monkeypatch, name, call, number):
    """sample.NAME, which evaluations call, sends this process a signal the call-th time (from 0), and is left there."""
    function, calls = getattr(sample, name), itertools.count()

    def signalled(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), number)
            raise AssertionError('the evaluation goes on')
        return function(*args, **kwargs)

    monkeypatch.setattr(sample, name, signalled)


@pytest.mark.parametrize('case, call, number', [
    ('causal_lm', 0, signal.SIGTERM), ('causal_lm', 3, signal.SIGINT), ('causal_lm', 7, signal.SIGTERM),
    ('masked_lm', 1, signal.SIGINT), ('masked_lm', 4, signal.SIGTERM), ('classify', 0, signal.SIGINT),
    ('classify', 3, signal.SIGTERM), ('bleu', 0, signal.SIGTERM), ('bleu', 2, signal.SIGINT),
    ('the whole split', 2, signal.SIGTERM)])
def test_a_signal_during_an_evaluation_saves_without_it_and_resume_makes_up_for_it(
        world, unbroken, tmp_path, monkeypatch, case, call, number):
    """Status 128 + n, the checkpoint of that step, no word of the evaluation; the resumed run is the unbroken one."""
    dataset, flags, name, often = CASES[case]
    step = [0, 3, 6, 8][call // often]
    with monkeypatch.context() as patch:
        signal_at(patch, name, call, number)
        status, said, err = ended('train.py', words({**TINY, **flags, 'dataset': world / 'data' / dataset,
                                                     'out_dir': tmp_path}))
    assert status == 128 + number, f'{status}\n{said}\n{err}'
    assert f'stopped at step {step}: go on with --init_from resume' in said and 'once more to end at once' in err, said + err
    assert f'step {step}: train loss' not in said and 'Traceback' not in err, said + err
    checkpoint = read(tmp_path / 'ckpt.pt')
    assert (checkpoint['step'], checkpoint['evaluated']) == (step, {0: -1, 3: 0, 6: 3, 8: 6}[step])
    assert [row[0] for row in log_rows(tmp_path)] == ['step', '0', '3', '6'][:1 + [0, 3, 6, 8].index(step)]
    assert (tmp_path / 'best.pt').exists() == (step > 0), 'an evaluation that was broken off found something to be the best'
    fit('', tmp_path, init_from='resume')
    assert_same_end(tmp_path, unbroken(dataset, **flags))


def test_a_second_signal_during_an_evaluation_ends_at_once(world, tmp_path, monkeypatch):
    """Nothing is saved any more; what was saved before is untouched."""
    function, calls = sample.evaluating, itertools.count()

    def signalled(model):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(model)

    def twice(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return save(*args, **kwargs)

    save = models.save
    fit(world / 'data/text', tmp_path, max_iters=0)
    before = (tmp_path / 'ckpt.pt').read_bytes()
    monkeypatch.setattr(sample, 'evaluating', signalled)
    monkeypatch.setattr(train, 'save', twice)
    status, _, err = ended('train.py', words({'init_from': 'resume', 'out_dir': tmp_path, 'max_iters': 5}))
    assert status == 130 and 'Traceback' not in err, f'{status}\n{err}'
    assert (tmp_path / 'ckpt.pt').read_bytes() == before


def signalled_runs(data, out):
    """
    What each of two processes does under torchrun: train, with a signal to one of the two while it evaluates, and go on. In
    the last case the scores of that one are not those of the other, and neither may act on them alone.
    """
    rank, found = int(os.environ['RANK']), {}
    torch.distributed.init_process_group('gloo', timeout=datetime.timedelta(seconds=30))  # or it would wait for minutes
    torch.distributed.destroy_process_group = lambda: None  # several runs, one group
    train.Log.plot = lambda log: None
    for number, (case, dataset, at, call, flags) in enumerate([
            ('one loss', 'text', 'evaluating', 3, dict(preset='gpt2')),
            ('masked', 'books', 'evaluating', 2, dict(preset='bert')),
            ('texts', 'seq2seq', 'write_targets', 1, dict(preset='transformer', best_by='bleu')),
            ('a target', 'seq2seq', 'write_targets', 0, dict(preset='transformer', best_by='bleu', target_loss=100.0))]):
        base = words({**TINY, 'eval_interval': 2, 'max_iters': 4, 'dataset': f'{data}/{dataset}', **flags})
        train.main([*base, f'--out_dir={out}/{case}/whole'])
        with pytest.MonkeyPatch.context() as patch:
            if rank == number % 2:
                signal_at(patch, at, call, signal.SIGTERM)
            try:
                train.main([*base, f'--out_dir={out}/{case}/broken'])
                found[case] = 0
            except SystemExit as e:
                found[case] = e.code
        train.main(['--init_from=resume', f'--out_dir={out}/{case}/broken'])
        (Path(out) / f'{rank}.json').write_text(json.dumps(found))


def test_a_signal_to_one_of_two_processes_that_evaluate_ends_both(world, tmp_path):
    """Nobody waits for the other for ever, and the resumed run is the unbroken one."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    result = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1',
                             f'--master_port={port}', __file__, str(world / 'data'), str(tmp_path)], capture_output=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}, encoding='utf-8',
                            timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    statuses = [json.loads((tmp_path / f'{rank}.json').read_text()) for rank in (0, 1)]
    for case in statuses[0]:
        assert_same_end(tmp_path / case / 'broken', tmp_path / case / 'whole')
    assert len(statuses[0]) == 4 and statuses[0] == statuses[1] == dict.fromkeys(statuses[0], 143), statuses
    assert 'done: 2 steps' not in result.stdout, 'what was stopped is not done'

# -----------------------------------------------------------------------------
# The checkpoint before the last


def dies_at(monkeypatch, target, nth, when):
    """The process is killed before or after the nth rename to a file of this name."""
    rename, calls = os.replace, itertools.count(1)

    def replace(source, name):
        hit = os.path.basename(name) == target and next(calls) == nth
        if hit and when == 'before':
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, name)
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(os, 'replace', replace)


def test_the_checkpoint_before_the_last_is_kept_and_is_whole(world, unbroken, tmp_path):
    """ckpt.prev.pt is what ckpt.pt was at the evaluation before, and a run can go on from it."""
    fit(world / 'data/text', tmp_path)
    whole, earlier = unbroken('text'), unbroken('text', max_iters=6, lr_decay_iters=8)
    assert_same_end(tmp_path, whole)
    kept, then = read(tmp_path / 'ckpt.prev.pt'), read(earlier / 'ckpt.pt')
    assert [kept[key] for key in ('step', 'evaluated', 'waited')] == [then[key] for key in ('step', 'evaluated', 'waited')]
    assert [unlike(kept[key], then[key], key) for key in ('model', 'optimizer', 'scaler')] == [[], [], []]
    os.remove(tmp_path / 'ckpt.pt')
    assert 'resumed at step 6' in fit('', tmp_path, init_from='resume')
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize('target, nth, when, left, way', [
    ('ckpt.prev.pt', 1, 'before', 0, 'auto'), ('ckpt.prev.pt', 1, 'after', 0, 'resume'), ('ckpt.pt', 3, 'after', 6, 'auto'),
    ('ckpt.prev.pt', 2, 'after', 3, 'auto'), ('ckpt.pt', 2, 'before', 0, 'auto'), ('best.pt', 2, 'before', 0, 'resume')])
def test_a_kill_between_two_renames_loses_nothing(world, unbroken, tmp_path, monkeypatch, target, nth, when, left, way):
    """The newest whole checkpoint is found under whichever of its two names, and the run ends as if it had not died."""
    with monkeypatch.context() as patch:
        dies_at(patch, target, nth, when)
        status, _, err = ended('train.py', words({**TINY, 'dataset': world / 'data/text', 'out_dir': tmp_path}))
    assert status == -signal.SIGKILL, f'{status}\n{err}'
    assert f'resumed at step {left}' in fit('', tmp_path, init_from=way, **(TINY if way == 'auto' else {}))
    assert_same_end(tmp_path, unbroken('text'))


FOREIGN = {
    'empty': lambda data: b'', 'cut short': lambda data: data[:len(data) // 2], 'one byte short': lambda data: data[:-1],
    'one bit': lambda data: data[:2000] + bytes([data[2000] ^ 4]) + data[2001:], 'text': lambda data: TEXT.encode(),
    'nothing but zeros': lambda data: bytes(len(data)), 'a zip': lambda data: zipped({'a': b'b'}),
    'no dict': lambda data: saved([1, 2]), 'other weights': lambda data: saved({'weight': torch.zeros(3)}),
    'code': lambda data: pickle.dumps(Code())}


def zipped(files, how=zipfile.ZIP_STORED):
    with io.BytesIO() as f:
        with zipfile.ZipFile(f, 'w', how) as parts:
            for name, data in files.items():
                parts.writestr(name, data)
        return f.getvalue()


def saved(data, **how):
    with io.BytesIO() as f:
        torch.save(data, f, **how)
        return f.getvalue()


class Code:
    """What a stranger could put into a pickle: it would write a file where it is opened."""

    def __reduce__(self):
        return Path.write_text, (Path('executed'), 'code of a stranger')


@pytest.mark.parametrize('damage', FOREIGN)
def test_auto_goes_on_from_the_checkpoint_before_a_damaged_one_and_resume_refuses_it(world, unbroken, tmp_path, monkeypatch,
                                                                                     damage):
    """Each says in one line which file is not whole; the run ends as if nothing had happened."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(unbroken('text'), 'out')
    latest = Path('out/ckpt.pt')
    latest.write_bytes(FOREIGN[damage](latest.read_bytes()))
    line = refused('train.py', ['--init_from=resume'])
    assert 'out/ckpt.pt is not a' in line, line
    said = fit('', 'out', init_from='auto', **TINY).splitlines()
    assert [line for line in said if line.startswith('out/ckpt.pt is not a') and 'ckpt.prev.pt' in line] == said[:1], said
    assert 'resumed at step 6' in said[1], said
    assert_same_end(Path('out'), unbroken('text'))
    assert not Path('executed').exists(), 'code of a stranger was run'


def test_two_damaged_checkpoints_are_one_line(unbroken, tmp_path, monkeypatch):
    """There is nothing to go on from; nothing is touched."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(unbroken('text'), 'out')
    for name in ('ckpt.pt', 'ckpt.prev.pt'):
        Path('out', name).write_bytes(b'half a')
    line = refused('train.py', ['--init_from=auto'])
    assert 'ckpt.prev.pt is not a whole checkpoint' in line, line
    assert Path('out/ckpt.pt').read_bytes() == Path('out/ckpt.prev.pt').read_bytes() == b'half a'


@pytest.mark.parametrize('target, when', [('ckpt.pt', 'before'), ('ckpt.pt', 'after')])
def test_a_damaged_checkpoint_never_takes_the_place_of_the_whole_one_before(world, unbroken, tmp_path, monkeypatch, target,
                                                                            when):
    """A run that went on from ckpt.prev.pt and is killed in its first save still has a whole one to go on from."""
    shutil.copytree(unbroken('text'), tmp_path / 'out')
    (tmp_path / 'out/ckpt.pt').write_bytes(b'half a')
    with monkeypatch.context() as patch:
        dies_at(patch, target, 1, when)
        ended('train.py', words({**TINY, 'init_from': 'auto', 'out_dir': tmp_path / 'out'}))
    fit('', tmp_path / 'out', init_from='auto', **TINY)
    assert_same_end(tmp_path / 'out', unbroken('text'))
    models.read_checkpoint(tmp_path / 'out/ckpt.prev.pt')


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A checkpoint of a few kB: (its path, its bytes, what it holds)."""
    path = tmp_path_factory.mktemp('small') / 'ckpt.pt'
    model = models.build(models.Config(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=2, mlp_dim=2))
    models.save(path, model, step=3, labels=['好', 'e\u0301'])
    return path, path.read_bytes(), models.read_checkpoint(path)


@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=3 * DRAWS)
def test_any_bit_that_flips_is_noticed_or_changes_nothing(small, at, bit):
    """Weights that differ in one bit would look as good as any: the file holds checksums."""
    path, data, whole = small
    at = int(at * len(data))
    path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:])
    try:
        found = models.read_checkpoint(path)
    except ValueError as e:
        assert 'ckpt.pt is not a' in str(e) and '\n' not in str(e), e
    else:
        assert unlike(found, whole) == [], f'bit {bit} of byte {at} of {len(data)}'


def test_a_compressed_checkpoint_is_refused_before_it_unpacks(small):
    """A few kB could unpack to anything; what torch writes is never compressed."""
    path, data, _ = small
    with zipfile.ZipFile(io.BytesIO(data)) as parts:
        files = {name: parts.read(name) for name in parts.namelist()}
    path.write_bytes(zipped(files))
    models.read_checkpoint(path)
    path.write_bytes(zipped(files, zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match='not a whole checkpoint'):
        models.read_checkpoint(path)


@pytest.mark.parametrize('kind', ['zip', 'of before 2020', 'a bare pickle'])
def test_code_in_a_checkpoint_does_not_run(small, tmp_path, monkeypatch, kind):
    """In any kind of file that torch reads; an old one without code opens."""
    monkeypatch.chdir(tmp_path)
    path, _, whole = small
    old = {'_use_new_zipfile_serialization': False} if kind == 'of before 2020' else {}
    write = pickle.dumps if kind == 'a bare pickle' else lambda tree: saved(tree, **old)
    Path('bad.pt').write_bytes(write({**whole, 'step': Code()}))
    with pytest.raises(ValueError, match=r'bad\.pt is not a whole checkpoint'):
        models.load('bad.pt')
    assert os.listdir() == ['bad.pt'], 'code of a stranger was run'
    if kind != 'a bare pickle':
        path.write_bytes(write(whole))
        assert unlike(models.read_checkpoint(path), whole) == []


@pytest.mark.parametrize('damage', ['too short', 'one number spread', 'too few', 'of one weight more', 'not there', 'text'])
def test_the_state_of_an_optimizer_is_looked_at_before_it_is_used(world, unbroken, tmp_path, damage):
    """AdamW works on bare memory: where a stranger's state is too short, it would write behind its end."""
    shutil.copytree(unbroken('text'), tmp_path / 'out')
    checkpoint = read(tmp_path / 'out/ckpt.pt')
    m, v, t = (state := checkpoint['optimizer'][0]['state'])[0]
    state[0] = {'too short': [m[:1].clone(), v[:1].clone(), t], 'too few': [m, v], 'text': 'mvt',
                'one number spread': [m[:1, :1].clone().expand(2 ** 20, 2 ** 20), v, t]}.get(damage, state[0])
    if damage == 'of one weight more':
        state[len(state)] = [m, v, t]
    if damage == 'not there':
        checkpoint['optimizer'] = [{}]
    torch.save(checkpoint, tmp_path / 'out/ckpt.pt')
    line = refused('train.py', words({'init_from': 'resume', 'out_dir': tmp_path / 'out', 'max_iters': 10}))
    assert 'optimizer' in line, line

# -----------------------------------------------------------------------------
# Other data, and files that vanish or find no room


@pytest.mark.parametrize('dataset, part', [('text', 'text'), ('text', 'val'), ('classify', 'rows'), ('classify', 'val')])
def test_a_run_goes_on_with_the_same_data_only(world, unbroken, tmp_path, dataset, part):
    """Prepared again it is the same; another text of the same length is refused by name, before any work."""
    def prepare_again(changed):
        for name, text in (('train', TEXT), ('val', TEXT[:900])) if dataset == 'text' else (
                ('train', ROWS['classify']), ('val', ROWS['classify'])):
            if changed and name == {'text': 'train', 'rows': 'train'}.get(part, part):
                text = text.replace('quick', 'kciuq').replace('Ann', 'nnA')
            (tmp_path / name).write_text(text, encoding='utf-8', newline='\n')
        prepare_data.prepare(prepare_data.Settings(
            input=[f'{tmp_path}/train'], val=[f'{tmp_path}/val'], tokenizer='byte', block_size=32,
            out_dir=f'{tmp_path}/data', task='classify' if dataset == 'classify' else 'lm'))

    preset = 'bert' if dataset == 'classify' else 'gpt2'
    prepare_again(changed=False)
    fit(f'{tmp_path}/data', tmp_path / 'whole', preset=preset)
    fit(f'{tmp_path}/data', tmp_path / 'out', preset=preset, max_iters=3, lr_decay_iters=8)
    prepare_again(changed=True)
    before = (tmp_path / 'out/ckpt.pt').read_bytes()
    line = refused('train.py', words({'init_from': 'resume', 'out_dir': tmp_path / 'out', 'max_iters': 8}))
    assert f'--dataset {tmp_path}/data' in line and 'was trained on' in line, line
    assert (tmp_path / 'out/ckpt.pt').read_bytes() == before
    prepare_again(changed=False)
    fit('', tmp_path / 'out', init_from='resume', max_iters=8)
    resumed, whole = (read(tmp_path / name / 'ckpt.pt') for name in ('out', 'whole'))
    assert unlike(resumed['model'], whole['model']) == []


@pytest.mark.parametrize('vanishes', ['log.csv', 'ckpt.pt', 'ckpt.prev.pt', ''])
def test_files_that_are_removed_under_a_run_are_written_again(world, unbroken, tmp_path, monkeypatch, vanishes):
    """One of them, or ('') the whole folder: the run goes on, and what it leaves is whole."""
    update, whole = train.update, unbroken('text')

    def meanwhile(step, *args):
        if step == 4:
            shutil.rmtree(tmp_path / 'out') if not vanishes else os.remove(tmp_path / 'out' / vanishes)
        return update(step, *args)

    monkeypatch.setattr(train, 'update', meanwhile)
    fit(world / 'data/text', tmp_path / 'out')
    assert_same_end(tmp_path / 'out', whole)


@pytest.mark.parametrize('trouble', ['log.csv', '', 'no room for a picture'])
def test_a_picture_that_cannot_be_drawn_stops_nothing(world, unbroken, tmp_path, monkeypatch, trouble):
    """loss.png is an extra: a run that was told to stop saves and ends with 143 though its log or its folder is gone."""
    from matplotlib.figure import Figure
    plot = train.Log.plot
    monkeypatch.undo()
    assert train.Log.plot is not plot
    update, savefig = train.update, Figure.savefig

    def full(figure, *args, **kwargs):
        raise OSError(28, 'No space left on device')

    def meanwhile(step, *args):
        if step == 4:
            if trouble == 'no room for a picture':
                Figure.savefig = full
            else:
                shutil.rmtree(tmp_path / 'out') if not trouble else os.remove(tmp_path / 'out' / trouble)
            os.kill(os.getpid(), signal.SIGTERM)
        return update(step, *args)

    monkeypatch.setattr(train, 'update', meanwhile)
    status, said, err = ended('train.py', words({**TINY, 'dataset': world / 'data/text', 'out_dir': tmp_path / 'out'}))
    assert (status, Figure.savefig) == (143, savefig) and 'error' not in err, f'{status}\n{said}\n{err}'
    monkeypatch.undo()
    monkeypatch.setattr(train.Log, 'plot', lambda log: None)
    assert 'resumed at step 5' in fit('', tmp_path / 'out', init_from='resume')
    assert unlike(read(tmp_path / 'out/ckpt.pt')['model'], read(unbroken('text') / 'ckpt.pt')['model']) == []


def room_for(monkeypatch, name, nth, room=30):
    """The nth time that a file of this name is written, the disk has room for 30 bytes and no more."""
    calls = itertools.count()

    def write_file(path, *args, write=models.write_file, **kwargs):
        full = os.path.basename(path) == name and next(calls) == nth
        _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard) if full else limits)
        try:
            write(path, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(models, 'write_file', write_file)  # of checkpoints
    monkeypatch.setattr(train, 'write_file', write_file)   # of the log


@pytest.mark.parametrize('name, nth, step', [
    ('log.csv', 0, None), ('log.csv', 2, 0), ('best.pt', 0, None), ('best.pt', 1, 0), ('ckpt.pt', 0, None),
    ('ckpt.pt', 1, 0), ('ckpt.pt', 3, 6)])
def test_a_full_disk_is_one_line_that_names_the_file_and_loses_nothing(world, unbroken, tmp_path, monkeypatch, name, nth,
                                                                       step):
    """Once there is room again, the run goes on from what was saved before; or begins, where nothing was."""
    flags = {**TINY, 'dataset': world / 'data/text', 'out_dir': tmp_path}
    with monkeypatch.context() as patch:
        room_for(patch, name, nth)
        line = refused('train.py', words(flags))
    assert name in line and ('large' in line or 'space' in line), line
    assert not list(tmp_path.glob('*.tmp')), 'half a file was left'
    if step is not None:
        models.read_checkpoint(tmp_path / 'ckpt.pt')
    if step == 6:
        models.read_checkpoint(tmp_path / 'ckpt.prev.pt')
    said = fit('', init_from='auto', out=tmp_path, **{k: flags[k] for k in flags if k != 'out_dir'})
    assert (f'resumed at step {step}' in said) == (step is not None), said
    assert_same_end(tmp_path, unbroken('text'))


@pytest.mark.parametrize('out', ['text.txt/out', 'text.txt', 'link/out'] + ['/proc/out'] * (sys.platform == 'linux'))
def test_an_out_dir_that_cannot_be_written_is_one_line_before_training(world, tmp_path, monkeypatch, out):
    """Not after hours of work."""
    monkeypatch.chdir(tmp_path)
    Path('text.txt').write_text('a text')
    Path('link').symlink_to('text.txt')
    monkeypatch.setattr(train, 'gradient', None)  # there is no step
    monkeypatch.setattr(train, 'estimate', None)
    line = refused('train.py', words({**TINY, 'dataset': world / 'data/text', 'out_dir': out}))
    assert out in line, line
    assert Path('text.txt').read_text() == 'a text'

# -----------------------------------------------------------------------------
# Command lines


def works_or_refuses(script, argv, stdin=b''):
    """Run it; an AssertionError unless it worked, or said in one line what is wrong. Returns its status."""
    status, out, err = ended(script, argv, stdin)
    line = err.startswith(f'{script}: error: ') and err.count('\n') == 1 and len(err) > len(f'{script}: error: \n')
    assert status == 0 or (status == 2 and line), f'{script} {argv} ended with {status}:\n{out[-500:]}\n{err[-3000:]}'
    return status


def everything(folder, but=()):
    """What lies below a folder, and when it was last written."""
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob('*')
            if path.is_file() and not any(path.is_relative_to(folder / name) for name in but)}


VALUES = ['', ' ', '-', '--', '-1', '0', '1', '2', '3.5', '1e999', '-1e999', 'nan', '1e-300', 'None', 'True', '真', '💥',
          '\udcff', '٣', '../..', '/dev/null', '.', 'out', 'resume', 'auto', '-x', 'a\nb', '%s{}', '"', '9' * 30,
          '-' + '9' * 30, '4294967296', '9' * 5000, 'x' * 5000, '0x10', '1_0', 'FILE:', 'FILE:text.txt', 'text.txt',
          'rows.tsv', 'linear 2', 'linear -1', 'llama3 1 2 3 4']
STRAY = ['--', '-', 'word', '--unknown=1', '--n-layer', '--no-tied', '--no-compile=1', '--no-max-iters', '-h', '--help',
         '--=', '--seed=', '---seed=1', '', '--input', '💥']
KINDS = {'train.py': (train.Settings, models.Config), 'sample.py': (sample.Settings,),
         'prepare_data.py': (prepare_data.Settings,)}
BASE = {'train.py': words({**TINY, 'dataset': 'text', 'max_iters': 1, 'eval_iters': 1, 'block_size': 8}),
        'sample.py': ['--out_dir=out', '--start=The 狐狸', '--max_new_tokens=4', '--device=cpu', '--seed=1'],
        'prepare_data.py': ['--out_dir=data/new', '--tokenizer=byte']}
TOO_MUCH = {'max_iters', 'eval_iters', 'batch_size', 'gradient_accumulation_steps', 'sample_tokens', 'max_new_tokens',
            'num_samples', 'n_layer', 'num_beams'}  # who asks for 65537 of these may have to wait for them
LIKELY = {  # what gets further than the first check
    int: ['0', '1', '2', '3', '5', '8', '31', '64', '300', '-1', '٣', '1_0', '65537', '4294967296', '9' * 30],
    float: ['0', '0.1', '0.5', '1', '2.5', '-1', '1e-300', '1e-9', '3e38', '1e300', '9' * 30],
    bool: ['True', 'False', '0', 'yes'], str: ['', *VALUES], list: ['text.txt', 'rows.tsv', '.', 'data', '狐']}


def command_line(rng):
    """(script, flags): one to three flags of any kind with any value, in any way to write them, some without a value."""
    script, argv = rng.choice(list(KINDS)), []
    fields = [f for cls in KINDS[script] for f in dataclasses.fields(cls)]
    for _ in range(rng.choice([1, 1, 2, 3])):
        f = rng.choice(fields)
        likely = list(filter(None, f.metadata.get('choices') or LIKELY[f.metadata.get('kind') or type(f.default)]))
        values = rng.choice([likely, likely, likely, VALUES])
        huge = ['300', '65537'] + ['4294967296', '9' * 30] * (f.name not in ('n_layer', 'num_beams'))
        values = [v for v in values if f.name not in TOO_MUCH or v not in huge]
        name, value = rng.choice([f.name, f.name.replace('_', '-')]), rng.choice(values)
        argv += rng.choice([[f'--{name}={value}'], [f'--{name}', value]] * 3 + [
            [f'--{name}'], [f'--{name}={value}', f'--{name}', value], [rng.choice(STRAY)]])
    if script == 'prepare_data.py':
        argv = rng.choice([['--input=text.txt'], ['--input=rows.tsv', '--task=classify'], []]) + argv
    return script, argv


@pytest.fixture(scope='module')
def desk(world):
    """Where the drawn commands run: a folder with data, a trained model, a text and labelled rows; not the top one."""
    folder = world / 'desk/a/b'
    folder.mkdir(parents=True)
    shutil.copytree(world / 'data/text', folder / 'data/text')
    shutil.copytree(world / 'runs/gpt2', folder / 'out')
    (folder / 'text.txt').write_text(TEXT, encoding='utf-8')
    (folder / 'rows.tsv').write_text(ROWS['classify'], encoding='utf-8')
    return world / 'desk'


def try_command_line(desk, script, argv):
    """In a copy of the desk, which is all that may be touched."""
    copied, others = desk.with_name('copy'), ('copy',)
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(desk, copied)
    before = everything(desk.parent, others)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(copied / 'a/b')
        patch.setattr(torch, 'compile', lambda model: model)  # the real one takes long
        for name in ('pydoc', 'pytopics', 'pytokens', 'numbers'):  # so do those that need no network
            task = prepare_data.DATASETS[name][0]
            patch.setitem(prepare_data.DATASETS, name, (task, lambda mirror, task=task: ROWS.get(task, TEXT)))
        status = works_or_refuses(script, BASE[script] + argv, b'The\n')
    assert everything(desk.parent, others) == before, f'{script} {argv} wrote elsewhere'
    return status


@given(rng=st.randoms(use_true_random=True))
@settings(max_examples=DRAWS)
def test_any_command_line_works_or_is_refused_in_one_line(desk, rng):
    """Whatever stands behind the name of a script: it works, or exit status 2 and one line; no traceback, no hang."""
    line = command_line(rng)
    note(line)
    try_command_line(desk, *line)

# -----------------------------------------------------------------------------
# Mangled files


INSTEAD = [None, True, -1, 0, 1, 7, 2 ** 31, 2 ** 63, 10 ** 30, 0.5, -0.5, 1e300, float('inf'), float('nan'), '', 'x', '狐',
           '\ud83d', 'a\nb', '../..', '/dev/null', 'x' * 5000, [], [1], ['a', 'b'], [[]], [None], {},
           {'a': 1}, {'0': 'a', '1': 'b'}]
TENSORS = [  # what can stand in the place of a tensor
    lambda t: t.half(), lambda t: t.double(), lambda t: t.long(), lambda t: t.bool(), lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.float8_e4m3fn), lambda t: t * float('nan'), lambda t: t + float('inf'), lambda t: t[None],
    lambda t: t.flatten(), lambda t: t.mT, lambda t: t.mT.contiguous().mT, lambda t: t[:len(t) // 2],
    lambda t: t.new_zeros(0), lambda t: t.new_zeros(()), lambda t: t.new_zeros(()).expand(t.shape),  # all are one number
    lambda t: t.new_zeros(1).expand(2 ** 40), lambda t: t.to_sparse(), lambda t: t.to('meta'), torch.nn.Parameter,
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)]


def mangled(tree, rng, top=True):
    """A copy of a tree of dicts and lists in which one place, at any depth, is another."""
    if isinstance(tree, (dict, list)) and tree and (top or rng.random() < 0.8):
        tree, key = copy.copy(tree), rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        how = rng.choice(['below'] * 6 + ['remove', 'add', 'another key'])
        if how == 'below' or (how == 'another key' and isinstance(tree, list)):
            tree[key] = mangled(tree[key], rng, top=False)
        elif how == 'remove':
            del tree[key]
        elif isinstance(tree, list):
            tree.insert(key, rng.choice(INSTEAD))
        else:
            tree[rng.choice(['added', 'é', '0', *tree])] = rng.choice(INSTEAD) if how == 'add' else tree.pop(key)
        return tree
    if isinstance(tree, torch.Tensor) and rng.random() < 0.8:
        with contextlib.suppress(RuntimeError, TypeError, NotImplementedError):  # there is no such thing of this tensor
            return rng.choice(TENSORS)(tree)
    return rng.choice(INSTEAD)


def mangled_bytes(data, rng):
    """The bytes of a file, damaged, or of something else altogether."""
    at, code = rng.randrange(len(data) + 1), {'config': {}, 'model': {}, 'code': Code()}
    flip = lambda: data[:at] + bytes(b ^ 1 << rng.randrange(8) for b in data[at:at + 1]) + data[at + 1:]
    return rng.choice([flip, flip, flip, lambda: data[:at], lambda: data[:at] + bytes(64) + data[at + 64:],
                       lambda: data[:at] + data[at + 1:], lambda: data + data, lambda: pickle.dumps(Code()),
                       lambda: saved(code), lambda: saved(code, _use_new_zipfile_serialization=False),
                       lambda: rng.choice([b'', b'[' * 100_000, b'null', b'3', b'"x"', b'9' * 5000, b'{"a": NaN}',
                                           bytes(range(256))])])()


def mangled_table(table, rng):
    """train.sentences.npy with another number, or of another kind or shape."""
    changed = table.astype(np.int64)
    changed[rng.randrange(len(table)), rng.randrange(2)] = rng.choice([-5, 0, 1, 3, 10 ** 6, 2 ** 40])
    return rng.choice([changed, changed, changed, table[::-1], table[:, 0], np.array([Code()] * 2, object), table / 3,
                       table.astype(str), table[:0], np.array(3), np.repeat(table, 2, axis=1), table * 0, table[:1]])


FILES = {'data': ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin', 'train.sentences.npy', 'val.sentences.npy',
                  'train.jsonl', 'val.jsonl'],
         'runs': ['ckpt.pt', 'ckpt.pt', 'ckpt.pt', 'best.pt', 'log.csv'],
         'hf': ['config.json', 'tokenizer.json', 'tokenizer_config.json', 'model.safetensors', 'pytorch_model.bin',
                'model.safetensors.index.json', 'vocab.txt']}


def mangle(path, rng):
    """Write other content, or other bytes, into a file; returns how."""
    data, kind = path.read_bytes(), path.name if path.suffix == '.bin' else path.suffix
    lines = data.split(b'\n')
    with io.BytesIO() as f:
        if rng.random() < 0.3 or not data or kind in ('.csv', '.txt'):
            f.write(mangled_bytes(data, rng))
        elif kind == '.npy':
            np.save(f, mangled_table(np.load(path), rng), allow_pickle=True)
        elif kind in ('train.bin', 'val.bin'):
            ids = np.frombuffer(data, np.uint16).copy()
            ids[rng.randrange(len(ids))] = rng.randrange(65536)
            f.write(ids.tobytes())
        elif kind in ('.pt', 'pytorch_model.bin'):
            torch.save(mangled(torch.load(path, weights_only=True), rng), f)
        elif kind == '.jsonl':
            at = rng.randrange(len(lines) - 1)
            f.write(b'\n'.join([*lines[:at], json.dumps(mangled(json.loads(lines[at]), rng)).encode(), *lines[at + 1:]]))
        elif kind == '.safetensors':
            end = 8 + struct.unpack('<Q', data[:8])[0]
            header = json.dumps(mangled(json.loads(data[8:end]), rng)).encode()
            f.write(struct.pack('<Q', len(header)) + header + data[end:])
        else:
            f.write(json.dumps(mangled(json.loads(data), rng)).encode())
        path.write_bytes(f.getvalue())


def another_form(hf, file):
    """The same Hugging Face folder with its weights or its tokenizer in files of another kind."""
    from safetensors.torch import load_file
    weights, described = hf / 'model.safetensors', json.loads((hf / 'tokenizer.json').read_text(encoding='utf-8'))
    if file == 'pytorch_model.bin':
        torch.save(load_file(weights), hf / file)
        weights.unlink()
    elif file == 'model.safetensors.index.json':
        (hf / file).write_text(json.dumps({'weight_map': dict.fromkeys(load_file(weights), weights.name)}))
    elif file == 'vocab.txt':
        (hf / file).write_text('\n'.join(described['model']['vocab']) + '\n[SEP]\n[UNK]\n', encoding='utf-8')
        (hf / 'tokenizer.json').unlink()


def try_mangled(world, what, rng):
    """Mangle a file in a copy of what a stranger sent, then train, evaluate, write or prepare data with it."""
    desk, name = world / 'mangled', rng.choice([n for n in RUNS if what != 'hf' or n in models.FAMILIES])
    shutil.rmtree(desk, ignore_errors=True)
    places = {'data': f'data/{RUNS[name]}', 'runs': f'runs/{name}', 'hf': f'hf/{name}'}
    for place in places.values():
        if (world / place).exists():
            shutil.copytree(world / place, desk / place)
    data, run, hf = (desk / place for place in places.values())
    file = rng.choice(FILES[what])
    if what == 'hf':
        another_form(hf, file)
    path = desk / places[what] / file
    if not path.exists():
        path = path.with_name('meta.json')
    for _ in range(rng.choice([1, 1, 2])):
        with contextlib.suppress(Exception):  # what was mangled before may be no JSON any more
            mangle(path, rng)
    origin = hf if what == 'hf' else run / (file if file.endswith('.pt') else 'ckpt.pt')
    small = ['--max_iters=3', '--eval_interval=5', '--eval_iters=1', '--batch_size=2', '--device=cpu', '--dtype=float32',
             '--sample_tokens=3', '--gradient_accumulation_steps=1']
    new = [*small, f'--dataset={data}', f'--out_dir={desk}/new']
    ask = [f'--init_from={origin}', '--start=The', '--max_new_tokens=3', '--device=cpu', '--seed=1']
    ways = {
        'tune': ('train.py', [*new, f'--init_from={origin}']),
        'evaluate': ('train.py', ['--eval_only', *new, f'--init_from={origin}']),
        'ask': ('sample.py', ask), 'export': ('sample.py', [*ask, f'--export={desk}/new']),
        'score': ('sample.py', [*ask, f'--score={world}/data/{RUNS[name]}.{"text" if RUNS[name] == "text" else "rows"}']),
        'resume': ('train.py', [*small, f'--dataset={data}', f'--out_dir={run}', '--init_from=resume']),
        'auto': ('train.py', [*small, f'--out_dir={run}', '--init_from=auto']),
        'train': ('train.py', [*new, f'--preset={PRESET.get(name, name)}', *words(
            {key: TINY[key] for key in ('n_layer', 'n_embd', 'n_head', 'mlp_dim', 'block_size')})]),
        'prepare': ('prepare_data.py', [f'--input={world}/data/text.text', f'--out_dir={desk}/new',
                                        f'--tokenizer={hf if what == "hf" else data}'])}
    way = rng.choice({'data': ['train', 'train', 'evaluate', 'resume', 'prepare'],
                      'runs': ['tune', 'evaluate', 'ask', 'export', 'score', *['resume', 'auto'] * (file != 'best.pt')],
                      'hf': ['tune', 'evaluate', 'ask', 'export', 'score', 'prepare']}[what])
    note((way, str(path)))
    mine = ('new', 'data/pydoc', places['runs'])
    before = everything(desk, mine)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        patch.setitem(prepare_data.DATASETS, 'pydoc', ('lm', lambda mirror: TEXT))  # the default, where no data set is named
        status = works_or_refuses(*ways[way])
    assert not list(desk.rglob('executed')), f'{way}: code of a stranger was run'
    assert everything(desk, mine) == before, f'{way} wrote elsewhere'
    return status


@pytest.mark.parametrize('what', FILES)
def test_whatever_a_file_holds_it_is_read_or_refused_in_one_line(world, what):
    """Checkpoints, data folders and Hugging Face folders from strangers: no traceback, no hang, and nothing is executed."""
    found = set()

    @given(rng=st.randoms(use_true_random=True))
    @settings(max_examples=-(-DRAWS // 3))
    def check(rng):
        found.add(try_mangled(world, what, rng))

    check()
    assert found == {0, 2}, f'nothing was {"refused" if 0 in found else "read"}'


if __name__ == '__main__':  # one of the two processes
    signalled_runs(*sys.argv[1:])
