"""
Tokens per second in training, beside transformers' GPT2LMHeadModel of the same shape with the same settings.

    python tests/bench/train_speed.py

Both train with AdamW on random tokens: forward, loss, backward, clipping, step. `share` is that of the machine's own speed
at matrix products of that dtype (measured here), counting 6 FLOPs a weight and token, and 12 * layers * channels * length a
token for attention.
"""

import argparse
import contextlib
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
    """A function that trains n steps and returns tokens a second."""
    def run():
        began = time.perf_counter()
        for _ in range(n):
            with torch.autocast('cpu', dtype) if dtype != torch.float32 else contextlib.nullcontext():
                loss = forward()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return n * tokens / (time.perf_counter() - began)

    run()
    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=10)
    args = parser.parse_args()
    train.keep_memory()
    rows = []
    for shape, (n_layer, n_head, n_embd, length, batch) in SHAPES.items():
        for dtype in ('float32', 'auto'):
            s = train.Settings(dtype=dtype, device='cpu')
            machine = train.Machine(s)
            config = model.Config(vocab_size=V, block_size=length, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
            ours = model.build(config).train()
            theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
                vocab_size=V, n_positions=length, n_layer=n_layer, n_head=n_head, n_embd=n_embd, resid_pdrop=0.0,
                embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)).train()
            ids = torch.randint(V, (batch, length + 1))
            x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            optimizer = train.make_optimizers(ours, s, machine.dtype)[0]
            other = torch.optim.AdamW(theirs.parameters(), lr=2e-3, fused=True)
            found = alternate({
                'ours': steps(ours, optimizer, lambda net=ours, x=x, y=y: net(x, targets=y)[1], machine.dtype, x.numel(),
                              args.steps),
                'transformers': steps(theirs, other, lambda net=theirs, x=x: net(x, labels=x).loss, torch.float32, x.numel(),
                                      args.steps),
            }, args.rounds)
            weights = sum(p.numel() for p in ours.parameters()) - ours.decoder.embed.positions.weight.numel()
            flops = 6 * weights + 12 * n_layer * n_embd * length
            rows.append([shape, dtype, found['ours'], found['transformers'], found['ours'] / found['transformers'],
                         f"{found['ours'] * flops / peak(machine.dtype):.0%}"])
    table(['shape', 'dtype', 'tokens/s', 'transformers float32', 'times as fast', 'share of peak'], rows)


if __name__ == '__main__':
    main()
