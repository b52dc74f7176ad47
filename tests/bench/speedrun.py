"""
Time to a loss: how long whole commands take, from the shell to a checkpoint, and what the checkpoint is worth.

    python tests/bench/speedrun.py --input shakespeare.txt [--nanogpt FOLDER]
    python tests/bench/speedrun.py --input shakespeare.txt --recipes "context 256"

The text is encoded by characters. `gpt2` is nanoGPT's recipe for a CPU (4 layers, 128 channels, block 64, batch 12, 2,000
steps) with this project's train.py, `nano` the sprint of the README; their loss is that of the whole validation split. `nanoGPT`
is that recipe run by its own code, a checkout of github.com/karpathy/nanoGPT; its loss is the one that it prints at the end.
`quick start` is `python train.py` alone, which prepares its data, too. `context 256` (a quarter of an hour) is below 1.4697.
"""

import argparse
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import command, table

RECIPES = {
    'gpt2': '--preset gpt2 --n_layer 4 --n_head 4 --n_embd 128 --block_size 64 --batch_size 12 --max_iters 2000 '
            '--warmup_iters 100 --learning_rate 1e-3 --beta2 0.99 --dropout 0 --no-bias --eval_interval 250',
    'nano': '--preset nano --block_size 64 --max_iters 64', 'quick start': '',
    'context 256': '--preset nano --n_layer 6 --n_embd 192 --n_head 3 --mlp_dim 512 --block_size 256 --batch_size 16 '
                   '--window "2 4 8 16 32 0" --max_iters 800 --weight_decay 0.1 --eval_interval 200',
}
NANOGPT = ('train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 '
           '--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 '
           '--dropout=0.0')  # as its README has it

def ours(name, seed, folder):
    """Seconds of a training, and the loss of its best checkpoint."""
    out = f'out-{name}-{seed}'.replace(' ', '-')
    data = ['--dataset', 'text'] if name != 'quick start' else []
    shutil.rmtree(Path(folder, 'data', 'pydoc'), ignore_errors=True)
    data += ['--device', 'cpu', '--out_dir', out]
    seconds, _ = command('train.py', *data, '--seed', seed, *shlex.split(RECIPES[name]), cwd=folder)
    _, said = command('train.py', '--eval_only', *data[-4:], cwd=folder)
    return seconds, float(re.search(r'loss ([\d.]+)', said)[1])

def theirs(seed, folder, quick):
    """The same of nanoGPT's own code, in a copy that `main` has made."""
    flags = [*shlex.split(NANOGPT), f'--out_dir=out-{seed}', *(['--max_iters=3', '--eval_interval=3'] if quick else [])]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *flags], cwd=folder, text=True, capture_output=True, check=True)
    return time.perf_counter() - began, float(re.findall(r'val loss ([\d.]+)', done.stdout)[-1])

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', required=True, help='a text file, such as Shakespeare')
    parser.add_argument('--nanogpt', help="a folder with nanoGPT's code")
    parser.add_argument('--runs', type=int, default=3, help='runs of each recipe, with seeds 1, 2, ...')
    parser.add_argument('--recipes', nargs='+', choices=RECIPES, default=['gpt2', 'nano', 'quick start'])
    parser.add_argument('--quick', action='store_true', help='a few steps, to see that all of it works')
    args = parser.parse_args()
    if args.quick:
        args.runs = 1
        RECIPES.update({name: f'{flags} --max_iters 3 --warmup_iters 1' for name, flags in RECIPES.items()})
    with tempfile.TemporaryDirectory() as folder:
        command('prepare_data.py', '--input', os.path.abspath(args.input), '--tokenizer', 'char', '--out_dir', 'data/text',
                cwd=folder)
        runs = {name: lambda seed, name=name: ours(name, seed, folder) for name in args.recipes}
        if args.nanogpt:
            copy = shutil.copytree(args.nanogpt, Path(folder, 'nanogpt'))
            shutil.copy(args.input, Path(copy, 'data/shakespeare_char/input.txt'))
            subprocess.run([sys.executable, 'data/shakespeare_char/prepare.py'], cwd=copy, check=True, capture_output=True)
            runs = {'nanoGPT': lambda seed: theirs(seed, copy, args.quick), **runs}
        results = {name: [] for name in runs}
        for seed in range(1, args.runs + 1):  # in turn, so that noise hits all alike
            for name, run in runs.items():
                results[name].append(run(seed))
    median = {name: statistics.median(seconds for seconds, _ in found) for name, found in results.items()}
    first, *_ = median
    rows = []
    for name, found in results.items():
        losses = sorted(loss for _, loss in found)
        rows.append([name, median[name], median[first] / median[name], f'{losses[0]:.4f} to {losses[-1]:.4f}'])
    table(['recipe', 'seconds', f'times as fast as {first}', 'loss, best to worst'], rows)

if __name__ == '__main__':
    main()
