"""
Tokens per second in training, beside transformers' GPT2LMHeadModel of the same shape with the same settings.

    python tests/bench/train_speed.py

Both train with AdamW on random tokens: forward, loss, backward, clipping, step; each in a process of its own, by turns.
`share` is that of the machine's own speed at matrix products of that dtype (measured here), counting 6 FLOPs a weight and
token, and 12 * layers * channels * length a token for attention.
"""

import argparse
import contextlib
import functools
import multiprocessing
import time

import torch
import transformers
from common import alternate, table

import model
import train

# layers, heads, channels, length, batch
SHAPES = {'4 x 128 x 64': (4, 4, 128, 64, 12), '6 x 384 x 256': (6, 6, 384, 256, 16)}
V = 65


def peak(dtype):
    """FLOP/s of a large matrix product."""
    a, b = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    a @ b
    began = time.perf_counter()
    for _ in range(5):
        a @ b
    return 5 * 2 * 2048 ** 3 / (time.perf_counter() - began)


def steps(net, optimizer, forward, dtype, tokens, n):
    """Train n steps: tokens a second."""
    began = time.perf_counter()
    for _ in range(n):
        with torch.autocast('cpu', dtype) if dtype != torch.float32 else contextlib.nullcontext():
            loss = forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return n * tokens / (time.perf_counter() - began)


def ours(shape, dtype):
    """(model, optimizer, function that gives the loss, dtype, tokens of a step) as train.py has them."""
    train.keep_memory()
    n_layer, n_head, n_embd, length, batch = SHAPES[shape]
    s = train.Settings(dtype=dtype, device='cpu')
    runtime = train.Runtime(s)
    net = model.build(model.Config(vocab_size=V, block_size=length, n_layer=n_layer, n_head=n_head,
                                   n_embd=n_embd)).train()
    ids = torch.randint(V, (batch, length + 1))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    optimizer, = train.adamw(model.optimizer_groups(net, s.weight_decay), s, runtime.dtype)
    return net, optimizer, lambda: net(x, targets=y)[1], runtime.dtype, x.numel()


def theirs(shape, dtype):
    """The same of transformers, in float32: what its users have on a CPU."""
    n_layer, n_head, n_embd, length, batch = SHAPES[shape]
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_positions=length, n_layer=n_layer, n_head=n_head, n_embd=n_embd, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)).train()
    x = torch.randint(V, (batch, length))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, fused=True)
    return net, optimizer, lambda: net(x, labels=x).loss, torch.float32, x.numel()


def side(pipe, make, shape, dtype, n):
    """One of the two, in a process of its own: how train.py has its memory kept must not help the other."""
    net, optimizer, forward, precision, tokens = make(shape, dtype)
    steps(net, optimizer, forward, precision, tokens, n)
    pipe.send((sum(p.numel() for p in net.parameters()), peak(precision)))
    while pipe.recv():
        pipe.send(steps(net, optimizer, forward, precision, tokens, n))


def ask(pipe):
    """Have a side train: its tokens a second."""
    pipe.send(True)
    return pipe.recv()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=10)
    args = parser.parse_args()
    rows, processes = [], multiprocessing.get_context('spawn')
    for shape, (n_layer, _, n_embd, length, _) in SHAPES.items():
        for dtype in ('float32', 'auto'):
            pipes, said = {}, {}
            for make in (ours, theirs):
                pipe, end = processes.Pipe()
                processes.Process(target=side, args=(end, make, shape, dtype, args.steps), daemon=True).start()
                pipes[make.__name__], said[make.__name__] = pipe, pipe.recv()

            found = alternate({name: functools.partial(ask, pipe) for name, pipe in pipes.items()}, args.rounds)
            for pipe in pipes.values():
                pipe.send(False)
            weights, most = said['ours']
            flops = 6 * (weights - length * n_embd) + 12 * n_layer * n_embd * length  # of the weights, not the positions
            rows.append([shape, dtype, found['ours'], found['theirs'], found['ours'] / found['theirs'],
                         f"{found['ours'] * flops / most:.0%}"])
    table(['shape', 'dtype', 'tokens/s', 'transformers float32', 'times as fast', 'share of peak'], rows)


if __name__ == '__main__':
    main()
