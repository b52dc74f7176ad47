"""
Learning in context: a rule that stands only in the prompt, and who can use it.

    python tests/bench/recall.py --plot recall.png          about 3 minutes on two cores

In a document of `recall`, 8 letters stand for a digit each, anew in every document. A model sees pairs of letter and digit,
then a letter, and is to say its digit: accuracy by the number of pairs before. `nano`, the same with its first three blocks
`near`-sighted, and an `lstm` of the same size read the same tokens in the same order. No weight changes while they are
asked; what they know of the rule they have just read. `could` is what looking up gives: the share of letters that were shown
before, and one in ten of the others by chance. Induction heads [1] learn this at once, between two evaluations.

References:
    [1] Olsson et al. 2022, In-context Learning and Induction Heads, https://arxiv.org/abs/2209.11895
"""

import argparse
import os
import re
import shlex
import tempfile

from common import command, table

import prepare_data

MODELS = {'nano': '--preset nano', 'near': '--preset nano --window "4 4 4 0"', 'lstm': '--preset lstm --n_embd 214'}
# 0.8 M weights each


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=1000, help='of 32 x 64 tokens')
    parser.add_argument('--plot', default='', help='picture to draw, such as recall.png')
    parser.add_argument('--quick', action='store_true', help='see in half a minute that all of it works')
    args = parser.parse_args(argv)
    small = ['--n_layer', 1] if args.quick else []
    steps = 4 if args.quick else args.steps
    if steps < 1:
        raise ValueError(f'--steps {steps}: must be at least 1')
    if args.plot:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ValueError('--plot needs matplotlib: pip install matplotlib') from None
    found = {}  # model -> [(step, {pairs: accuracy})]
    with tempfile.TemporaryDirectory() as folder:
        command('prepare_data.py', '--dataset', 'recall', '--tokenizer', 'char', cwd=folder)
        for name, flags in MODELS.items():
            prepare_data.progress(f'training {name}')
            seconds, said = command('train.py', '--dataset', 'recall', *shlex.split(flags), *small, '--block_size', 64,
                                    '--batch_size', 32, '--max_iters', steps, '--eval_interval', max(1, steps // 20),
                                    '--eval_iters', 2, '--sample_tokens', 0, cwd=folder)
            found[name] = [(int(step), {int(n): float(a) for n, a in re.findall(r'after (\d+) ([\d.]+)', line)})
                           for step, line in re.findall(r'^step (\d+): (.*)', said, re.M)]
            size = re.search(r'[\d,]+(?= parameters)', said)[0]
            appears = next((step for step, after in found[name] if after[29] > 0.5), None)
            prepare_data.progress('')
            print(f'{name}: {size} weights, {seconds:.0f} seconds; right more often than not after 29 pairs '
                  + (f'from step {appears} on' if appears else 'at no step'), flush=True)
    known = sorted(found['nano'][-1][1])
    could = [seen + 0.1 * (1 - seen) for seen in (1 - (7 / 8) ** n for n in known)]
    table(['pairs before', *map(str, known)], [['could', *(f'{a:.3f}' for a in could)], *(
        [name, *(f'{runs[-1][1][n]:.3f}' for n in known)] for name, runs in found.items())])
    if args.plot:
        left, right = Figure(figsize=(10, 4), layout='constrained').subplots(1, 2, sharey=True)
        left.plot(known, could, color='grey', linestyle=':', label='could')
        for name, runs in found.items():
            left.plot(known, [runs[-1][1][n] for n in known], marker='o', label=name)
            right.plot([step for step, _ in runs], [after[29] for _, after in runs], marker='.', label=name)
        left.set(xlabel='pairs before', ylabel='accuracy', title=f'after {steps:,} steps')
        right.set(xlabel='step', title='after 29 pairs')
        left.legend()
        left.figure.savefig(os.path.abspath(args.plot), dpi=100)


if __name__ == '__main__':
    prepare_data.run(main)
