"""
What a GPU gives in training; writing is tests/bench/generate.py. Two tables, each a command.
MFU (model FLOPs utilisation) is what the formula of `train.flops_per_token` asks for, over what a large bfloat16 product reaches
on this card. These are train.py's own steps on the text of the quick start, with GPT-2's number of tokens. --nanogpt takes a
checkout of github.com/karpathy/nanoGPT and runs its bench.py with the same shape.

    python tests/bench/gpu.py [--nanogpt FOLDER]     training GPT-2 124M
    python tests/bench/gpu.py --ladder               from float32 and eager to all of it, one thing at a time
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import torch
from torch.utils.benchmark import Timer
from common import table

import model
import prepare_data
import sample
import train

BASE = '--dataset data --preset gpt2-124m --vocab_size 50257 --batch_size 32 --gradient_accumulation_steps 1 --device auto'
TINY = ' --n_layer 1 --n_embd 32 --n_head 4 --block_size 64 --batch_size 2 --vocab_size 5000'

def adamw_by_formula(self, lr, decay, good, weights, gradients, m, v, t):
    """AdamW, one weight and one operation after the other."""
    for p, g, first, second, steps in zip(weights, gradients, m, v, t):
        steps += 1
        first.lerp_(g, 1 - self.beta1)
        second.lerp_(g * g, 1 - self.beta2)
        scaled = first / (1 - self.beta1 ** steps) / ((second / (1 - self.beta2 ** steps)).sqrt() + 1e-8)
        p -= lr * (scaled + decay * p)

LADDER = [  # (what comes on top, flags, the precision of float32 products, functions that are not fused)
    ('float32, eager', '--batch_size 8 --dtype float32 --no-compile', 'highest', 'attention adamw'),
    ('TF32', '', 'high', 'attention adamw'),
    ('bfloat16', '--dtype bfloat16', 'high', 'attention adamw'),
    ('fused AdamW', '', 'high', 'attention'),
    ('fused attention', '', 'high', ''),
    ('compile', '--compile', 'high', ''),
    ('vocabulary of a multiple of 64', '--vocab_size 50304', 'high', ''),
    ('batch of 32', '--batch_size 32', 'high', ''),
]

def train_speed(flags, steps, precision='high', by_hand=''):
    """Tokens a second of training, and GB of the device at most."""
    torch._dynamo.reset()  # or it would remember other sizes, and compile for any
    kernels = model.attention, train.AdamW.update
    if 'attention' in by_hand:
        model.attention = lambda q, k, v, drop, **how: model.attention_weights(q, k, **how) @ v
    train.AdamW.update = adamw_by_formula if 'adamw' in by_hand else train.AdamW.update
    groups = {'training': train.Settings, 'model': model.Config}
    net, s, data, val, _, runtime = train.start(train.read_flags(shlex.split(flags), '', groups))
    torch.set_float32_matmul_precision(precision)
    trainer = train.Trainer(net, data, val, s, runtime)
    for step in range(3 + steps):
        if step == 3:  # the first ones compile and prepare
            wait()
            began = time.perf_counter()
        loss = train.backward(step, net, trainer.forward, data, s, runtime)
        train.optimizer_step(step, loss, net, trainer.optimizers, s, runtime)
    gigabytes = torch.cuda.max_memory_allocated() / 1e9
    wait()
    rate = steps * trainer.tokens / (time.perf_counter() - began)
    model.attention, train.AdamW.update = kernels
    return rate, rate * train.flops_per_token(net), gigabytes

def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

def product_speed(n):
    """FLOP/s of a large bfloat16 product."""
    a = torch.randn(n, n, device=sample.find_device('auto'), dtype=torch.bfloat16)
    return 2 * n ** 3 / Timer('a @ a', globals={'a': a}).timeit(10).mean

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--nanogpt', help="a folder with nanoGPT's code")
    parser.add_argument('--ladder', action='store_true')
    parser.add_argument('--quick', action='store_true', help='a tiny model, to see that all of it works, on a CPU, too')
    args = parser.parse_args()
    tiny, steps = (TINY, 2) if args.quick else ('', 30)
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare_data.prepare(prepare_data.Settings(dataset='pydoc', out_dir='data'))
        speed = product_speed(256 if args.quick else 8192)
        print(f'a large product: {speed / 1e12:,.1f} TFLOP/s')
        if args.ladder:
            flags, rows = BASE, []
            for name, more, precision, by_hand in LADDER:
                flags += ' ' + more
                rate, used, gigabytes = train_speed(flags + tiny, steps, precision, by_hand)
                rows.append([name, rate, 100 * used / speed, gigabytes])
            table(['one thing more', 'tokens/s', 'MFU, %', 'GB'], rows)
        else:
            flags = BASE + ' --vocab_size 50304' + ' --compile' * (not args.quick)  # as in nanoGPT
            rate, used, gigabytes = train_speed(flags + tiny, steps)
            rows = [['this project', rate, 100 * used / speed, gigabytes]]
            if args.nanogpt:
                copy = shutil.copytree(os.path.join(here, args.nanogpt), 'nanogpt')
                flags = ['--batch_size=32', '--real_data=False', '--bias=True']
                done = subprocess.run([sys.executable, 'bench.py', *flags], cwd=copy, text=True, capture_output=True, check=True)
                ms = float(re.search(r'time per iteration: ([\d.]+)ms', done.stdout)[1])
                rows.append(["nanoGPT's bench.py", 32 * 1024 / ms * 1000, '', ''])
            table(['training, 124M', 'tokens/s', 'MFU, %', 'GB'], rows)
        os.chdir(here)

if __name__ == '__main__':
    main()
