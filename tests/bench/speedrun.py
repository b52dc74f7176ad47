"""
Time to a loss: how long whole commands take, from the shell to a checkpoint, and what the checkpoint is worth.

    python tests/bench/speedrun.py --input shakespeare.txt

The text is encoded by characters. `gpt2` is nanoGPT's recipe for a CPU (4 layers, 128 channels, block 64, batch 12, 2,000
steps); `nano` is this project's, at the learning rates of a sprint. The loss is that of the whole validation split.
"""

import argparse
import os
import re
import shlex
import statistics
import tempfile

from common import command, table

RECIPES = {
    'gpt2': '--preset gpt2 --n_layer 4 --n_head 4 --n_embd 128 --block_size 64 --batch_size 12 --max_iters 2000 '
            '--warmup_iters 100 --learning_rate 1e-3 --beta2 0.99 --dropout 0 --no-bias --eval_interval 250',
    'nano': '--preset nano --block_size 64 --window "2 4 4 0" --activation swiglu --mlp_dim 256 --max_iters 80 '
            '--learning_rate 4e-2 --muon_learning_rate 0.055 --eval_interval 80 --eval_iters 5 --sample_tokens 0',
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', required=True, help='a text file, such as Shakespeare')
    parser.add_argument('--runs', type=int, default=3, help='runs of each recipe, with seeds 1, 2, ...')
    parser.add_argument('--quick', action='store_true', help='a few steps, to see that all of it works')
    args = parser.parse_args()
    if args.quick:
        args.runs = 1
        RECIPES.update({name: f'{flags} --max_iters 3 --warmup_iters 1' for name, flags in RECIPES.items()})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        command('prepare_data.py', '--input', os.path.abspath(args.input), '--tokenizer', 'char', '--out_dir', 'data/text',
                cwd=folder)
        results = {name: [] for name in RECIPES}
        for seed in range(1, args.runs + 1):
            for name, flags in RECIPES.items():
                out = f'out-{name}-{seed}'
                seconds, _ = command('train.py', '--dataset', 'text', '--out_dir', out, '--seed', seed, *shlex.split(flags),
                                     cwd=folder)
                _, said = command('train.py', '--eval_only', '--out_dir', out, cwd=folder)
                results[name].append((seconds, float(re.search(r'loss ([\d.]+)', said)[1])))
        slow = statistics.median(seconds for seconds, _ in results['gpt2'])
        for name, found in results.items():
            seconds = statistics.median(seconds for seconds, _ in found)
            losses = sorted(loss for _, loss in found)
            rows.append([name, seconds, slow / seconds, f'{losses[0]:.4f} to {losses[-1]:.4f}'])
    table(['recipe', 'seconds', 'times as fast', 'loss, best to worst'], rows)


if __name__ == '__main__':
    main()
