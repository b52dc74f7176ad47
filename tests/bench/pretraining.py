"""
Why pre-train? Accuracy where 100 texts are labelled, 1,000, or all: of a small BERT from nothing, of the same after it has
read all texts without their labels [1, 2], and of an encoder that others have trained on far more.

    python tests/bench/pretraining.py --train rotten-tomatoes.train.tsv --val rotten-tomatoes.val.tsv --encoder FOLDER

Files hold label<TAB>text; without them, docstrings of Python are told apart by package. The encoder is a Hugging Face
folder; without one its row is left out. Half an hour on two cores, 24 minutes without an encoder. Every row is judged by the
whole validation file after the last step. Few labels are of each kind as many, and the 100 are among the 1,000.

    [1] Devlin et al. 2018, BERT, https://arxiv.org/abs/1810.04805
    [2] Howard and Ruder 2018, Universal Language Model Fine-tuning for Text Classification, https://arxiv.org/abs/1801.06146
"""

import argparse
import itertools
import os
import random
import re
import tempfile
from collections import Counter

import numpy as np
from common import command, table

import prepare_data

def steps_for(n):
    """Steps of 32 texts for n labels: 64 epochs of 100, 13 of 1,000, for many the number of the recipe of small models."""
    return 200 if n <= 100 else 400 if n <= 1000 else 1000

def few(lines, n, seed):
    """n of the lines, from each label in turn, in an order drawn from the seed: a larger n adds to a smaller one."""
    kinds = {}
    for line in random.Random(seed).sample(lines, len(lines)):
        kinds.setdefault(line.split('\t')[0], []).append(line)
    in_turn = itertools.zip_longest(*(kinds[label] for label in sorted(kinds)))
    return [line for group in in_turn for line in group if line is not None][:n]

def read_files(train, val):
    """The lines of both files; without files, docstrings. Raises ValueError or OSError."""
    if bool(train) != bool(val):
        raise ValueError('give both --train and --val, or neither')
    if not train:
        lines = prepare_data.pytopics()[0].splitlines()  # sorted by hash, so that any tenth is like any other
        return lines[len(lines) // 10:], lines[:len(lines) // 10]
    return tuple([line for _, line in prepare_data.read_lines(path) if line.strip()] for path in (train, val))

def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--train', default='', help='label<TAB>text, such as rotten-tomatoes.train.tsv')
    parser.add_argument('--val', default='', help='the same, to be judged by')
    parser.add_argument('--encoder', default='', help='a Hugging Face folder of an encoder, such as a MiniLM')
    parser.add_argument('--labels', nargs='+', type=int, default=[100, 1000], help='how many, before all')
    parser.add_argument('--reading_steps', type=int, default=2500, help='of pre-training; the number of its recipe')
    parser.add_argument('--seeds', type=int, default=1, help='draws of labels, each with weights of its own: the mean')
    parser.add_argument('--quick', action='store_true', help='see in half a minute that all of it works')
    args = parser.parse_args(argv)
    small, tuning = [], steps_for
    if args.quick:
        small, tuning = '--n_layer 1 --n_embd 32 --n_head 2'.split(), lambda n: 10
        args.labels, args.reading_steps = [50], 20
    lines, judges = read_files(args.train, args.val)
    kinds = {line.split('\t')[0] for line in lines}
    sizes = [n for n in sorted(set(args.labels)) if n < len(lines)] + [len(lines)]
    if not judges or sizes[0] < len(kinds):
        raise ValueError(f'--labels {sizes[0]}: there are {len(kinds)} different ones, and {len(judges)} texts to judge by')

    with tempfile.TemporaryDirectory() as folder:
        def write(name, text):
            with open(os.path.join(folder, name), 'w', encoding='utf-8', newline='\n') as f:
                f.write('\n'.join(text) + '\n')

        def prepare(name, text, tokenizer):
            """Make data/name; its training split is the given lines."""
            write('train.tsv', text)
            command('prepare_data.py', '--task', 'classify', '--input', 'train.tsv', '--val', 'val.tsv', '--tokenizer',
                    tokenizer, '--out_dir', f'data/{name}', cwd=folder)

        write('val.tsv', judges)
        prepare('own', lines, 'bpe')
        prepare_data.progress('reading the texts')
        reading, _ = command('train.py', '--preset', 'bert', *small, '--dataset', 'own', '--objective', 'masked_lm',
                             '--dropout', 0.1, '--max_iters', args.reading_steps, '--eval_interval', args.reading_steps,
                             '--out_dir', 'out-read', cwd=folder)
        ways = {'from nothing': ('few', ['--preset', 'bert', *small]),
                'after reading the texts': ('few', ['--init_from', 'out-read'])}
        tokenizers, spent = {'few': 'own'}, {'from nothing': 0, 'after reading the texts': reading}
        if args.encoder:
            path = os.path.abspath(args.encoder)
            ways['after the reading of others'], spent['after the reading of others'] = ('others', ['--init_from', path]), 0
            tokenizers['others'] = path
        scores = {(way, n): [] for way in ways for n in sizes}
        for seed, n in itertools.product(range(1, args.seeds + 1), sizes):
            for data, tokenizer in tokenizers.items():
                prepare(data, few(lines, n, seed), tokenizer)
            for way, (data, start) in ways.items():
                prepare_data.progress(f'seed {seed}, {n:,} labels, {way}')
                seconds, said = command(
                    'train.py', *start, '--dataset', data, '--seed', seed, '--max_iters', tuning(n), '--warmup_iters',
                    tuning(n) // 10, '--eval_interval', tuning(n), '--eval_iters', 1, cwd=folder)
                spent[way] += seconds
                scores[way, n].append(float(re.findall(r'step \d+: .*, accuracy ([\d.]+)', said)[-1]))
    prepare_data.progress('')
    common = Counter(line.split('\t')[0] for line in judges).most_common(1)[0][1] / len(judges)
    table(['accuracy', *(f'{n:,} labels' for n in sizes), 'seconds'], [
        ['the commonest label', *(f'{common:.3f}' for _ in sizes), ''],
        *([way, *(f'{np.mean(scores[way, n]):.3f}' for n in sizes), spent[way]] for way in ways),
        ['steps', *(f'{tuning(n):,}' for n in sizes), '']])
    print(f'The seconds of the second row hold {reading:.0f} of pre-training, {args.reading_steps:,} steps.')

if __name__ == '__main__':
    prepare_data.run(main)
