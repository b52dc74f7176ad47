"""
Runs that are killed again and again, beside runs that nobody touches: not a bit may differ. And memory must not grow.

    python tests/soak.py --minutes 10 --presets nano bert t5 --seed 0

A tiny model saves after every second step; SIGKILL, SIGTERM or Ctrl-C ends it after 1 to 5 seconds, --init_from auto goes on
until it is done; then the next preset. Exit status 1 where a bit differs, a run is lost, or memory grows by more than 2 %.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # tiny models: threads would only wait for each other
import torch

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parent.parent))
import sample
import train
from prepare_data import Settings, prepare

TEXT = ''.join(f'{i}. The 狐狸 jumps over {i * i} 犬, e\u0301t 🦊.\n' + '<|endoftext|>\n' * (i % 40 < 1) for i in range(200))
PAIRS = ''.join(f'{i} times two\t{2 * i}\n' for i in range(200))
TINY = dict(n_layer=2, n_embd=32, n_head=2, block_size=64, batch_size=4, dropout=0.1, eval_iters=2, sample_tokens=0,
            device='cpu', eval_interval=2)
ENDS = [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT]


def start(folder, out, preset, steps, seed):
    """The command, in the background."""
    flags = dict(TINY, preset=preset, dataset=f'{folder}/{"pairs" if preset == "transformer" else "text"}', out_dir=out,
                 init_from='auto', seed=seed, max_iters=steps, optimizer=('adamw', 'muon')[seed % 2])
    words = [sys.executable, str(ROOT / 'train.py'), *(f'--{key}={value}' for key, value in flags.items())]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8')


def differing_bits(a, b):
    """In all tensors of two trees; anything else that is not equal counts as one bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype):
        a, b = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
        return sum(int(((a ^ b) >> i & 1).sum()) for i in range(8))
    if isinstance(a, dict) and isinstance(b, dict):  # time and place, and what is set anew before each step, may differ
        return sum(differing_bits(a.get(k), b.get(k)) for k in a.keys() | b.keys() if k not in ('seconds', 'out_dir', 'lr'))
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return sum(map(differing_bits, a, b))
    return int(a != b)


def left(out):
    """All that a run leaves, without the seconds of its log."""
    log = csv.reader(Path(out, 'log.csv').read_text(encoding='utf-8').splitlines())
    return [[row[:-1] for row in log], *(torch.load(Path(out, name), weights_only=True) for name in ('ckpt.pt', 'best.pt'))]


def torment(folder, preset, steps, seed, rng):
    """A run that is killed until it is done, and one that is not: (1, kills, resumes, differing bits, lost runs)."""
    out, kills, resumes, status = f'{folder}/{preset}-{seed}', 0, 0, None
    while status != 0:
        process = start(folder, out, preset, steps, seed)
        resumes += 'resumed' in process.stdout.readline()  # from here on it trains
        try:
            err = process.communicate(timeout=rng.uniform(0, 4))[1]
        except subprocess.TimeoutExpired:
            process.send_signal(rng.choice(ENDS))
            err, kills = process.communicate(timeout=120)[1], kills + 1
        status = process.returncode
        if status and not {-status, status - 128} & set(ENDS):  # below 0: Python was about to end anyway
            print(f'{preset}, seed {seed}: lost after {kills} kills, status {status}\n{err}')
            return 1, kills, resumes, 0, 1
    whole = start(folder, f'{out}-whole', preset, steps, seed)
    assert not whole.communicate(timeout=600)[1] and not whole.returncode
    return 1, kills, resumes, differing_bits(left(out), left(f'{out}-whole')), 0


def growth(folder):
    """{what: how the memory of this process grows from 100 to 10,000 of them, in per cent}"""
    resident = lambda: int(Path('/proc/self/status').read_text().split('VmRSS:')[1].split()[0])
    steps, update, train.Log.plot = [], train.update, lambda log: None
    train.update = lambda *args: (steps.append(resident()), update(*args))
    model, s, tokenizer, data, val, *_ = train.start(dict(TINY, n_layer=1, dataset=f'{folder}/text', max_iters=10_000,
                                                          out_dir=f'{folder}/memory', eval_interval=2500))
    train.train(model, data, val, s, tokenizer)
    tokens = [resident() for _ in sample.generate(model, torch.zeros(1, 1, dtype=torch.long), 10_000)]
    return {name: 100 * (of[9999] / of[99] - 1) for name, of in (('steps', steps), ('tokens', tokens))}


def main():
    parser = argparse.ArgumentParser()
    for name, default in (('minutes', 10.0), ('steps', 200), ('seed', 0)):
        parser.add_argument(f'--{name}', type=type(default), default=default)
    parser.add_argument('--presets', nargs='+', default='nano bert t5 gpt2 llama palm lstm transformer'.split())
    args = parser.parse_args()
    rng, table, turn = random.Random(args.seed), {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for name, text, task in (('text', TEXT, 'lm'), ('pairs', PAIRS, 'seq2seq')):
            Path(folder, f'{name}.tsv').write_text(text, encoding='utf-8')
            prepare(Settings(input=[f'{folder}/{name}.tsv'], tokenizer='byte', out_dir=f'{folder}/{name}', task=task))
        until = time.monotonic() + 60 * args.minutes
        while time.monotonic() < until:
            preset, seed = args.presets[turn % len(args.presets)], args.seed + turn // len(args.presets)
            row, turn = torment(folder, preset, args.steps, seed, rng), turn + 1
            table[preset] = [a + b for a, b in zip(table.get(preset, [0] * 5), row)]
        memory = growth(folder)
    print(f'{"preset":12} {"runs":>5} {"kills":>6} {"resumes":>8} {"differing bits":>15} {"lost runs":>10}')
    for preset, (runs, kills, resumes, bits, lost) in table.items():
        print(f'{preset:12} {runs:5} {kills:6} {resumes:8} {bits:15,} {lost:10}')
    for name, percent in memory.items():
        print(f'memory from 100 to 10,000 {name}: {percent:+.2f} %')
    sys.exit(any(bits or lost for *_, bits, lost in table.values()) or any(percent > 2 for percent in memory.values()))


if __name__ == '__main__':
    main()
