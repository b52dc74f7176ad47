"""
Learning in context: a rule that stands only in the prompt, and who can use it.

    python tests/bench/recall.py --plot recall.png          about 3 minutes on two cores

In a document of `recall`, 8 letters stand for a digit each, anew in every document. A model reads
pairs of letter and digit, then a letter, and predicts its digit: accuracy by the number of pairs
before. `nano`, the same without its windows (`far`), and an `lstm` of about their size read the
same tokens in the same order. No weight changes while they are tested. `could` is what looking up
gives: the share of letters that were shown before, and one in ten of the others by chance.
Induction heads [1] learn this at once, between two evaluations.
    [1] Olsson et al. 2022, In-context Learning and Induction Heads, https://arxiv.org/abs/2209.11895
"""

import argparse
import os
import shlex
import tempfile
import time

import numpy as np
import torch
from common import command, table

import prepare_data
import sample
import train
from model import Config

MODELS = {'nano': '--preset nano', 'far': '--preset nano --window 0',
          'lstm': '--preset lstm --n_embd 214'}  # 0.7 M weights, and 0.8 M
SHOWN = (0, 1, 2, 4, 8, 16, 29)

def in_context_accuracy(model, data):
    """{pairs before: how often the digit behind a letter is predicted}, over documents of `recall`."""
    end = np.flatnonzero(data.tokens == data.tokenizer.end_id)
    length = end[0] + 1                                # letters and digits, a line end, <|endoftext|>
    ids = np.roll(data.tokens[:end[-1] + 1].reshape(-1, length), 1, axis=1)[:, :length - 1]
    ids = torch.from_numpy(ids.astype(np.int64))       # <|endoftext|> k 7 a 2 k 7 ...
    with sample.evaluating(model):
        guesses = torch.cat([model(rows[:, :-1])[0][:, 1::2].argmax(dim=-1) for rows in ids.split(256)])
    right = (guesses == ids[:, 2::2]).float().mean(dim=0).tolist()
    return {n: right[n] for n in SHOWN}

class Recorder(train.Trainer):
    """Notes the accuracy at each evaluation: [(step, {pairs: accuracy})]."""

    def evaluate(self):
        self.found = [*getattr(self, 'found', []), (self.at.step, in_context_accuracy(self.model, self.val))]
        return super().evaluate()

def train_one(flags, folder):
    """(number of weights, what a Recorder found)."""
    given = prepare_data.read_flags(flags, '', {'training': train.Settings, 'model': Config})
    model, s, data, val, _, runtime = train.start(given)
    os.makedirs(s.out_dir, exist_ok=True)
    runtime.print0 = lambda text: None
    trainer = Recorder(model, data, val, s, runtime)
    trainer.run()
    return sum(p.numel() for p in model.parameters()), trainer.found

def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=1000, help='of 32 x 64 tokens')
    parser.add_argument('--plot', default='', help='picture to draw, such as recall.png')
    parser.add_argument('--quick', action='store_true', help='see in half a minute that it works')
    args = parser.parse_args(argv)
    small = ['--n_layer', '1'] if args.quick else []
    steps = 4 if args.quick else args.steps
    if args.plot:
        from matplotlib.figure import Figure
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        command('prepare_data.py', '--dataset', 'recall', '--tokenizer', 'char', cwd=folder)
        for name, flags in MODELS.items():
            prepare_data.progress(f'training {name}')
            started = time.perf_counter()
            size, found[name] = train_one([
                '--dataset', os.path.join(folder, 'data', 'recall'), *shlex.split(flags), *small, '--block_size', '64',
                '--batch_size', '32', '--max_iters', str(steps), '--eval_interval', str(max(1, steps // 20)),
                '--eval_iters', '2', '--sample_tokens', '0', '--out_dir', os.path.join(folder, name)], folder)
            appears = next((step for step, after in found[name] if after[29] > 0.5), None)
            prepare_data.progress('')
            print(f'{name}: {size:,} weights, {time.perf_counter() - started:.0f} seconds; right more often than not after 29 '
                  f'pairs {f"from step {appears} on" if appears else "at no step"}', flush=True)
    could = [seen + 0.1 * (1 - seen) for seen in (1 - (7 / 8) ** n for n in SHOWN)]
    rows = [[name, *(f'{runs[-1][1][n]:.3f}' for n in SHOWN)] for name, runs in found.items()]
    table(['pairs before', *map(str, SHOWN)], [['could', *(f'{a:.3f}' for a in could)], *rows])
    if args.plot:
        left, right = Figure(figsize=(10, 4), layout='constrained').subplots(1, 2, sharey=True)
        left.plot(SHOWN, could, color='grey', linestyle=':', label='could')
        for name, runs in found.items():
            left.plot(SHOWN, [runs[-1][1][n] for n in SHOWN], marker='o', label=name)
            right.plot([step for step, _ in runs], [after[29] for _, after in runs], marker='.', label=name)
        left.set(xlabel='pairs before', ylabel='accuracy', title=f'after {steps:,} steps')
        right.set(xlabel='step', title='after 29 pairs')
        left.legend()
        left.figure.savefig(os.path.abspath(args.plot), dpi=100)

if __name__ == '__main__':
    prepare_data.run(main)
