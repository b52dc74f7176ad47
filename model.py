"""
The Transformer family in one file. Read it from top to bottom: every part is defined before it is used.

    Config, PRESETS     what can be chosen, and what each model of history chose
    sinusoids, rotate   where a token stands
    attention           softmax(Q Kᵀ / sqrt(D)) V, and the layer around it: Attention
    MLP, Block          think alone; talk, think, and add both to the stream
    Embedding, Stack    ids -> vectors -> n_layer blocks; the masks are made here, once for all blocks
    Output              vectors -> logits
    GPT, LSTM, BERT, EncoderDecoder     ids -> logits, loss; TaskModel puts one Linear on any of them
    build, save, load   configuration -> model -> file -> model
    optimizer_groups    which weights decay, and which are matrices
    FAMILIES            what Hugging Face calls all of this: from_huggingface, export_huggingface

The models are one set of parts; a row of this table fixes the choices (PRESETS has them as code):

              looks at   norm                    positions   MLP           heads           output
    transformer  source  LayerNorm, after        sinusoids   ReLU          H               tied, all three
    bert      all        LayerNorm, after        learned     GELU          H               tied + bias
    gpt2      the past   LayerNorm, before       learned     GELU (tanh)   H               tied
    t5        source     RMSNorm, before         relative    ReLU          H, not 1/sqrt(D) tied, x 1/sqrt(C)
    palm      the past   LayerNorm, before both  rotary      SwiGLU        one key/value   tied, x 1/sqrt(C)
    llama     the past   RMSNorm, before         rotary      SwiGLU        G key/value     its own
    nano      the past   RMSNorm, also on q, k   rotary      ReLU squared  H               its own, zero at first, capped
                         [12]                                [11]                          [13]
    lstm      a running state, no attention at all: what came before them

Shapes stand in comments where they change, in these letters:

    B batch    T query positions    S key/source positions    C channels (n_embd)
    H heads    G key/value heads    D channels per head       V vocabulary
    L labels   N asked tokens

References, cited by number:
    [1] Vaswani et al. 2017, Attention Is All You Need, https://arxiv.org/abs/1706.03762
    [2] Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2)
    [3] Chowdhery et al. 2022, PaLM, https://arxiv.org/abs/2204.02311
    [4] Touvron et al. 2023, LLaMA, https://arxiv.org/abs/2302.13971
    [5] Su et al. 2021, RoFormer (rotary positions), https://arxiv.org/abs/2104.09864
    [6] Shazeer 2020, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202
    [7] Ainslie et al. 2023, GQA: grouped key/value heads, https://arxiv.org/abs/2305.13245
    [8] Hochreiter and Schmidhuber 1997, Long Short-Term Memory
    [9] Ba et al. 2016, Layer Normalization, https://arxiv.org/abs/1607.06450
    [10] Zhang and Sennrich 2019, Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467
    [11] So et al. 2021, Primer (ReLU squared), https://arxiv.org/abs/2109.08668
    [12] Henry et al. 2020, Query-Key Normalization, https://arxiv.org/abs/2010.04245
    [13] Gemma Team 2024, Gemma 2 (capped logits), https://arxiv.org/abs/2408.00118
    [14] Devlin et al. 2018, BERT, https://arxiv.org/abs/1810.04805
    [15] Raffel et al. 2019, T5, https://arxiv.org/abs/1910.10683
    [16] Shaw et al. 2018, Self-Attention with Relative Position Representations, https://arxiv.org/abs/1803.02155
    [17] Szegedy et al. 2015, Rethinking the Inception Architecture (label smoothing), https://arxiv.org/abs/1512.00567
    [18] Srivastava et al. 2014, Dropout: A Simple Way to Prevent Neural Networks from Overfitting
    [19] Grattafiori et al. 2024, The Llama 3 Herd of Models, https://arxiv.org/abs/2407.21783
    [20] Beltagy et al. 2020, Longformer (sliding windows), https://arxiv.org/abs/2004.05150
    [21] Jiang et al. 2023, Mistral 7B, https://arxiv.org/abs/2310.06825
"""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import re
import warnings
import zipfile
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

IGNORE = -100  # a target with this value does not count in the loss; all others are `asked`

# -----------------------------------------------------------------------------
# What can be chosen. A checkpoint carries its Config, so a model can always be rebuilt from its file.


def choice(default, help, *choices):
    """A field that explains itself: train.py makes a flag of each, and --help shows what stands here."""
    return dataclasses.field(default=default, metadata={'help': help, 'choices': choices})


TASKS = ('classify', 'tag', 'qa')


@dataclass
class Config:
    """The architecture. Raises ValueError where the choices cannot be built together."""
    arch: str = choice('gpt', 'kind of model', 'gpt', 'bert', 'encdec', 'lstm')
    task: str = choice('', 'question that a head on top answers; the data says which', '', *TASKS)
    n_labels: int = choice(0, 'labels of the task, L; the data says how many')
    # sizes: small enough by default to train in minutes on a laptop
    vocab_size: int = choice(50257, 'number of different tokens, V')
    block_size: int = choice(128, 'longest sequence, in tokens')
    n_layer: int = choice(4, 'blocks in a stack')
    n_head: int = choice(4, 'attention heads, H')
    n_kv_head: int = choice(0, 'key/value heads, G; 0: as many as n_head')
    n_embd: int = choice(128, 'channels, C')
    head_dim: int = choice(0, 'channels per head, D; 0: n_embd / n_head')
    mlp_dim: int = choice(0, 'width inside the MLP; 0: 4 * n_embd')
    # what a block does
    norm: str = choice('layernorm', 'how the size of a vector is normalised', 'layernorm', 'rmsnorm')
    norm_eps: float = choice(1e-5, 'added to the variance before its root is taken')
    norm_weight: bool = choice(True, 'norms scale each channel by a learned weight')
    norm_first: bool = choice(True, 'True: x + f(norm(x)); False: norm(x + f(x)), as in 2017')
    qk_norm: bool = choice(False, 'normalise queries and keys, so that no score can explode')
    parallel: bool = choice(False, 'attention and MLP side by side instead of one after the other')
    activation: str = choice('gelu_tanh', 'the bend in the MLP', 'gelu_tanh', 'gelu', 'relu', 'relu2', 'swiglu', 'geglu')
    scale_attention: bool = choice(True, 'divide scores by sqrt(D); T5 leaves that to its weights')
    bias: bool = choice(True, 'biases in the linear layers and in LayerNorm')
    # how tokens come in and go out
    segments: int = choice(0, 'kinds of text that have an embedding: BERT tells sentence A from B')
    embedding_norm: bool = choice(False, 'normalise what enters the first block')
    positions: str = choice('learned', 'how order is told', 'learned', 'sinusoids', 'rotary', 'relative', 'none')
    rope_theta: float = choice(10000.0, 'rotary: base of the speeds theta^(-2i/D); a larger one turns slower')
    rope_scaling: str = choice('', 'rotary, stretched for long texts: linear FACTOR | llama3 FACTOR LOW HIGH LENGTH')
    window: str = choice('0', 'how many of the newest tokens one sees, itself included (an encoder: to both sides); 0: all. '
                              'For all blocks, or for each in turn: "4 4 4 0"')
    buckets: int = choice(32, 'relative: how many distances are told apart')
    max_distance: int = choice(128, 'relative: from here on, all distances are one')
    scale_embedding: bool = choice(False, 'multiply token embeddings by sqrt(C)')
    scale_output: bool = choice(False, 'multiply what the output layer reads by 1/sqrt(C)')
    tied: bool = choice(True, 'the output layer is the embedding matrix')
    logit_cap: float = choice(0.0, 'squash logits smoothly into (-cap, cap); 0: off')
    init: str = choice('gpt2', 'random weights to start from, see init_weights', 'gpt2', 'normal', 'fan_in', 'zero')
    dropout: float = choice(0.0, 'probability of zeroing a value while training')
    label_smoothing: float = choice(0.0, 'share of the target probability spread over all classes while training [17]')

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), type(f.default)
            if kind is float and type(value) is int and abs(value) < 1e300:
                setattr(self, f.name, float(value))
            elif type(value) is not kind:
                raise ValueError(f"{f.name}={value!r} must be of type {kind.__name__}")
            if f.metadata['choices'] and value not in f.metadata['choices']:
                raise ValueError(f"{f.name}={value} is unknown: choose one of "
                                 + ', '.join(filter(None, f.metadata['choices'])))
        for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ('n_kv_head', 'head_dim', 'mlp_dim', 'segments', 'n_labels'):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 (0 means: derive it, or none)")
        if self.segments and self.arch != 'bert':
            raise ValueError(f"segments={self.segments}: only arch=bert reads them")
        if self.task in ('classify', 'tag') and not self.n_labels:
            raise ValueError(f"task={self.task} needs n_labels, the number of labels to choose from")
        for name in ('dropout', 'label_smoothing'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and less than 1")
        if self.positions == 'relative' and not 4 <= self.buckets < 2 * self.max_distance:
            raise ValueError(f"buckets={self.buckets} must be at least 4 and less than twice max_distance="
                             f"{self.max_distance}")
        if self.label_smoothing and (self.arch == 'bert' or self.task):
            raise ValueError(f"label_smoothing={self.label_smoothing}: only models that write read it")
        if self.task and self.arch == 'encdec':
            raise ValueError(f"task={self.task}: an encoder-decoder answers with text: choose another arch")
        kind, *numbers = self.rope_scaling.split() or ['']
        if {'': 0, 'linear': 1, 'llama3': 4}.get(kind) != len(numbers) or not all(
                re.fullmatch(r'\d+(\.\d+)?(e[+-]?\d+)?', n) and 0 < float(n) < math.inf for n in numbers):
            raise ValueError(f"rope_scaling={self.rope_scaling} must be linear FACTOR or llama3 FACTOR LOW HIGH LENGTH, all "
                             "above 0")
        if kind == 'llama3' and float(numbers[1]) >= float(numbers[2]):
            raise ValueError(f"rope_scaling={self.rope_scaling}: of llama3 FACTOR LOW HIGH LENGTH, LOW must be below HIGH")
        self.rope_scaling = ' '.join([kind, *(str(float(n)) for n in numbers)])
        if not re.fullmatch(r'[0-9]{1,9}( [0-9]{1,9})*', ' '.join(self.window.split())):
            raise ValueError(f"window={self.window} must be a whole number, or several with spaces between them")
        self.window = ' '.join(str(int(n)) for n in self.window.split())
        for name in ('norm_eps', 'rope_theta'):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number above 0")
        if not 0 <= self.logit_cap < math.inf:
            raise ValueError(f"logit_cap={self.logit_cap} must be 0 or a number above it")
        if self.arch != 'lstm' and not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}: change one of them")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if self.positions == 'rotary' and self.head_size % 2:
            raise ValueError(f"rotary positions turn channels in pairs, and a head has {self.head_size}: "
                             "make n_embd / n_head even")
        if self.positions == 'sinusoids' and self.n_embd % 2:
            raise ValueError(f"sinusoids fill channels in pairs, and there are n_embd={self.n_embd}: make it even")

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def head_size(self):
        return self.head_dim or self.n_embd // self.n_head


PRESETS = {
    'transformer': Config(arch='encdec', norm_first=False, positions='sinusoids', activation='relu', scale_embedding=True,
                          init='fan_in', dropout=0.1, label_smoothing=0.1),
    'bert': Config(arch='bert', block_size=64, norm_first=False, norm_eps=1e-12, embedding_norm=True, segments=2,
                   activation='gelu', init='normal'),
    'gpt2': Config(),
    't5': Config(arch='encdec', norm='rmsnorm', norm_eps=1e-6, positions='relative', activation='relu', bias=False,
                 head_dim=32, scale_attention=False, scale_output=True, init='fan_in'),
    'palm': Config(norm='layernorm', parallel=True, positions='rotary', activation='swiglu', n_kv_head=1, bias=False,
                   scale_output=True, init='fan_in'),
    'llama': Config(norm='rmsnorm', norm_eps=1e-6, positions='rotary', activation='swiglu', n_kv_head=2, mlp_dim=344,
                    bias=False, tied=False, init='normal'),  # 344: 2/3 of 4C; G < H came with Llama 2
    'nano': Config(norm='rmsnorm', norm_eps=1e-6, norm_weight=False, qk_norm=True, positions='rotary',
                   activation='relu2', bias=False, tied=False, logit_cap=15.0, init='zero'),
    'lstm': Config(arch='lstm', positions='none', n_layer=2, n_embd=256, tied=False, init='fan_in'),
}
PRESETS |= {  # the published sizes, on top of their row
    'transformer-base': dataclasses.replace(PRESETS['transformer'], vocab_size=37000, block_size=512, n_layer=6, n_head=8,
                                            n_embd=512),
    't5-small': dataclasses.replace(PRESETS['t5'], vocab_size=32128, block_size=512, n_layer=6, n_head=8, n_embd=512,
                                    head_dim=64),
    'bert-base': dataclasses.replace(PRESETS['bert'], vocab_size=30522, block_size=512, n_layer=12, n_head=12, n_embd=768),
    'gpt2-124m': dataclasses.replace(PRESETS['gpt2'], block_size=1024, n_layer=12, n_head=12, n_embd=768),
    'palm-8b': dataclasses.replace(PRESETS['palm'], vocab_size=256000, block_size=2048, n_layer=32, n_head=16,
                                   n_embd=4096, head_dim=256, mlp_dim=16384),
    'llama-7b': dataclasses.replace(PRESETS['llama'], vocab_size=32000, block_size=2048, n_layer=32, n_head=32,
                                    n_kv_head=32, n_embd=4096, mlp_dim=11008),
}

# -----------------------------------------------------------------------------
# Positions. Attention alone is blind to order; each of these is one way to tell it.


def sinusoids(length, channels):
    """
    PE(pos, 2i) = sin(pos / 10000^(2i/C)), PE(pos, 2i+1) = cos(the same): section 3.5 of [1]. Fixed, not learned.
    Each pair of channels is the hand of a clock, from one turn every 2 pi positions to very slow. Returns (T, C).
    """
    position = torch.arange(length, device='cpu')[:, None]                             # (T, 1)
    speed = 10000.0 ** (-torch.arange(0, channels, 2, device='cpu') / channels)        # (C/2,)
    return torch.stack([(position * speed).sin(), (position * speed).cos()], dim=2).flatten(1)


def rotary_angles(length, channels, theta, scaling=''):
    """
    How far each pair of channels has turned at each position, in radians: section 3.2 of [5]. Returns (T, D/2).
    scaling lets a model read texts longer than those it was trained on: `linear f` turns all pairs f times slower; `llama3 f
    low high length` only those that turn fewer than `low` times in `length` positions, and those that turn more than `high`
    times not at all [19].
    """
    speed = theta ** (-torch.arange(0, channels, 2, device='cpu') / channels)          # (D/2,)
    kind, *numbers = scaling.split() or ['']
    if kind == 'linear':
        speed = speed / float(numbers[0])
    elif kind == 'llama3':
        factor, low, high, trained = map(float, numbers)
        keep = ((trained * speed / (2 * math.pi) - low) / (high - low)).clamp(0, 1)    # 0: slowed down, 1: as it was
        speed = (1 - keep) * speed / factor + keep * speed
    return torch.arange(length, device='cpu')[:, None] * speed


def distance_buckets(distance, both_sides, buckets=32, max_distance=128):
    """
    key position - query position (T, S) -> its bucket: section 2.1 of [15], after [16]. Half of the buckets are for single
    distances, the other half for ever wider ranges up to max_distance, and all beyond. both_sides: half of all buckets for
    keys to the right; else (a decoder) those count as distance 0.
    """
    right = torch.zeros_like(distance)
    if both_sides:
        buckets //= 2
        right = (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    near = buckets // 2
    far = near + (torch.log(distance.clamp(min=1) / near) / math.log(max_distance / near) * (buckets - near)).long()
    return right + torch.where(distance < near, distance, far.clamp(max=buckets - 1))


def rotate(x, cos, sin):
    """
    Turn each pair of channels of x (B, H, T, D) by the angle of its position. The product of a turned query and a turned
    key depends only on how far apart they stand. The two of a pair lie half a head apart, as in LLaMA's code; the paper
    pairs neighbours, which is the same up to the order of channels.
    """
    a, b = x.chunk(2, dim=-1)                                                          # 2 x (B, H, T, D/2)
    cos, sin = cos.type_as(x), sin.type_as(x)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], dim=-1)

# -----------------------------------------------------------------------------
# Attention


def dropout(x, p):
    """
    Zero each value with probability p and scale up the others, so that the mean stays [18]. A CPU draws one byte a value, so
    there p is a multiple of 1/256: with that it takes a seventh of the time of F.dropout.
    """
    if not x.is_cpu or not p:
        return F.dropout(x, p)
    zeroed = max(1, min(255, round(256 * p)))                                          # of 256 bytes
    eight = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-2 ** 63, None)  # each number is eight draws
    kept = eight.view(torch.uint8)[:x.numel()].view(x.shape) >= zeroed
    return x * kept.to(x.dtype) * (256 / (256 - zeroed))


class Dropout(nn.Dropout):
    def forward(self, x):
        return dropout(x, self.p) if self.training else x


def attention_weights(q, k, mask=None, causal=False, scale=None):
    """
    Who looks at whom: softmax(q kᵀ * scale) of equation 1 in [1], with scale = 1/sqrt(D) unless given. Each row of the
    answer sums to 1. q (B, H, T, D), k (B, H, S, D) -> (B, H, T, S).

    mask is bool, True = may look (as in F.scaled_dot_product_attention; nn.MultiheadAttention means the opposite),
    or float, added to the scores. causal=True lets query i see the keys up to i, counting both from the first.

    By hand, for four one-hot vectors x_1..x_4: e_ij = x_i·x_j / sqrt(4) is 1/2 where i = j and 0 elsewhere, so a token
    gives itself exp(1/2) / (exp(1/2) + 3) = 0.35 and each other exp(0) / (exp(1/2) + 3) = 0.22:

    >>> x = torch.eye(4)[None, None]
    >>> [round(weight, 2) for weight in attention_weights(x, x)[0, 0, 0].tolist()]
    [0.35, 0.22, 0.22, 0.22]
    >>> [round(weight, 2) for weight in attention_weights(x, x, causal=True)[0, 0, 1].tolist()]
    [0.38, 0.62, 0.0, 0.0]
    """
    scores = (q * (q.size(-1) ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)  # (B, H, T, S)
    if causal:
        scores = scores + torch.full_like(scores[0, 0], -math.inf).triu(1)
    if mask is not None and mask.dtype == torch.bool:  # to add is faster than to fill, and nothing to do on the way back
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -math.inf)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1)


def attention(q, k, v, mask=None, causal=False, scale=None, p=0.0):
    """
    z_i = sum_j weight_ij v_j: attention_weights @ v, by whichever of two roads is faster; they agree up to rounding.
    q (B, H, T, D), k and v (B, G, S, D), where each of the G key/value heads serves H/G query heads [7]; p: of
    dropout, on the weights.
    """
    # Measured on a CPU with bfloat16 at 256 positions: the fused kernel's backward made a training step 1.3 times
    # slower than the plain formula, and with dropout it falls back to one that is slower still. Long sequences need it all
    # the same: the plain formula stores all T x S weights.
    plain = q.is_cpu and (q.dtype == torch.bfloat16 or p > 0) and torch.is_grad_enabled() and k.size(2) <= 512
    mask = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
    if not plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale,
                                              dropout_p=p, enable_gqa=k.size(1) < q.size(1))
    if k.size(1) < q.size(1):
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))    # (B, H, S, D)
    return dropout(attention_weights(q, k, mask, causal, scale), p) @ v


def make_norm(config, channels):
    """
    LayerNorm [9]: (x - mean) / sqrt(var + eps) * w + b, over the channels of one position.
    RMSNorm [10]:  x / sqrt(mean of x² + eps) * w.
    """
    if config.norm == 'layernorm':
        return nn.LayerNorm(channels, config.norm_eps, elementwise_affine=config.norm_weight, bias=config.bias)
    return nn.RMSNorm(channels, config.norm_eps, elementwise_affine=config.norm_weight)


def keeping(t):
    """
    As what keys and values are cached: on a CPU, one query asks many keys 5 times as fast in float32 as in bfloat16. But
    autocast would turn them back at every step.
    """
    return t.float() if t.is_cpu and not torch.is_autocast_enabled('cpu') else t


def remember(cache, k, v):
    """Write the newest keys and values (B, G, T, D) behind the old ones; returns views of all, (B, G, S, D)."""
    past, total = cache.get('length', 0), cache.get('length', 0) + k.size(2)
    for name, new in (('k', k), ('v', v)):
        if name not in cache or cache[name].size(2) < total:  # no room: twice as much, so copies stay rare
            room = new.new_empty(*new.shape[:2], max(2 * past, total, 16), new.size(3))
            if past:
                room[:, :, :past] = cache[name][:, :, :past]
            cache[name] = room
        cache[name][:, :, past:total] = new
    cache['length'] = total
    return cache['k'][:, :, :total], cache['v'][:, :, :total]


class Linear(nn.Linear):
    """x Wᵀ + b, or some rows of it."""

    def forward(self, x, rows=slice(None)):
        return F.linear(x, self.weight[rows], None if self.bias is None else self.bias[rows])


class Attention(nn.Module):
    """
    Multi-head attention, section 3.2.2 of [1]. Every position asks a question (query), every position offers an
    address (key) and a content (value); the answer is the mean of the contents, weighted by how well address and
    question match. H heads ask H questions at once. Keys and values come from x itself, or in a decoder that reads
    a source (cross-attention) from `context`.
    """

    def __init__(self, config):
        super().__init__()
        H, G, D = self.sizes = config.n_head, config.kv_heads, config.head_size
        self.qkv = Linear(config.n_embd, (H + 2 * G) * D, config.bias)                 # one product, not three
        self.proj = nn.Linear(H * D, config.n_embd, config.bias)
        self.q_norm, self.k_norm = (make_norm(config, D) if config.qk_norm else nn.Identity() for _ in 'qk')
        self.dropout, self.scale = config.dropout, None if config.scale_attention else 1.0
        self.seen = None  # a list while somebody watches: the weights (B, H, T, S) of each call

    def project(self, x, rows):
        """Some rows of the packed matrix: x (B, T, C) -> heads (B, rows/D, T, D)."""
        return self.qkv(x, rows).unflatten(-1, (-1, self.sizes[2])).transpose(1, 2)

    def forward(self, x, context=None, mask=None, causal=False, rotary=None, cache=None):
        """
        x (B, T, C) -> (B, T, C). mask and causal as in attention_weights; rotary: (cos, sin) of the T new positions.
        cache: a dict that this layer fills. With it, x holds only new tokens, and the keys of the old ones are kept;
        a context is read into it once and then not again.
        """
        H, G, D = self.sizes
        if context is None:
            q, k, v = self.project(x, slice(None)).split([H, G, G], dim=1)             # (B, H | G | G, T, D)
            q, k = self.q_norm(q), self.k_norm(k)
            if rotary is not None:
                q, k = rotate(q, *rotary), rotate(k, *rotary)
            if cache is not None:
                k, v = remember(cache, keeping(k), keeping(v))                         # (B, G, S, D)
        else:
            q = self.q_norm(self.project(x, slice(0, H * D)))                          # (B, H, T, D)
            if cache:
                k, v = cache['k'], cache['v']
            else:
                k, v = self.project(context, slice(H * D, None)).chunk(2, dim=1)       # 2 x (B, G, S, D)
                k = self.k_norm(k)
                if cache is not None:
                    k, v = keeping(k), keeping(v)
                    cache.update(k=k, v=v)
            # the beams of one source stand in neighbouring rows, and ask it together, as if they were positions
            q = q.unflatten(0, (len(k), -1)).transpose(1, 2).flatten(2, 3)             # (B / beams, H, beams T, D)
        dtype, q = q.dtype, q.type_as(k)
        if self.seen is not None:
            self.seen.append(attention_weights(q, k.repeat_interleave(H // G, dim=1), mask, causal, self.scale))
        y = attention(q, k, v, mask, causal, self.scale, self.dropout if self.training else 0.0).to(dtype)
        if context is not None:
            y = y.unflatten(2, (-1, x.size(1))).transpose(1, 2).flatten(0, 1)          # (B, H, T, D)
        return self.proj(y.transpose(1, 2).flatten(2))                                 # heads side by side

# -----------------------------------------------------------------------------
# Blocks

ACTIVATIONS = {
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),  # what GPT-2 was trained with; not the exact one
    'gelu': F.gelu,
    'relu': F.relu,
    'relu2': lambda x: F.relu(x).square(),
    'swiglu': F.silu,
    'geglu': lambda x: F.gelu(x, approximate='tanh'),
}


class MLP(nn.Module):
    """max(0, x W_1 + b_1) W_2 + b_2: section 3.3 of [1]. At each position alone: widen, bend, come back."""

    def __init__(self, config):
        super().__init__()
        inner = config.mlp_dim or 4 * config.n_embd
        self.gated = config.activation in ('swiglu', 'geglu')  # act(x W) * x W': the second half is a gate [6]
        self.act = ACTIVATIONS[config.activation]
        self.fc = nn.Linear(config.n_embd, (2 if self.gated else 1) * inner, config.bias)
        self.proj = nn.Linear(inner, config.n_embd, config.bias)

    def forward(self, x):
        h = self.fc(x)                                                                 # (B, T, inner), twice that if gated
        if self.gated:
            h, gate = h.chunk(2, dim=-1)
            return self.proj(self.act(h) * gate)
        return self.proj(self.act(h))                                                  # (B, T, C)


class Block(nn.Module):
    """
    Talk to the other positions, (read the source,) think alone. x is the residual stream, to which each step adds.
    Pre-norm (GPT-2 on) normalises what a step reads, post-norm (2017, BERT) the stream itself; parallel (PaLM, section
    2 of [3]) lets attention and MLP read the same normalised stream and adds both at once.
    """

    def __init__(self, config, cross=False):
        super().__init__()
        self.norm_first, self.parallel = config.norm_first, config.parallel
        self.attn_norm, self.attn = make_norm(config, config.n_embd), Attention(config)
        self.mlp = MLP(config)
        if cross:
            self.cross = Attention(config)
        if not self.parallel:  # else all read the stream through attn_norm
            self.mlp_norm = make_norm(config, config.n_embd)
            self.cross_norm = make_norm(config, config.n_embd) if cross else None
        self.drop = Dropout(config.dropout)

    def residual(self, x, norm, step):
        if self.norm_first:
            return x + self.drop(step(norm(x)))
        return norm(x + self.drop(step(x)))

    def forward(self, x, look, read=None, cache=None):
        """x (B, T, C) -> (B, T, C). look, read: the arguments of self- and cross-attention, the same for all blocks."""
        own, source = (None, None) if cache is None else (cache.setdefault('self', {}), cache.setdefault('cross', {}))
        if self.parallel:
            return self.residual(x, self.attn_norm, lambda h: self.attn(h, **look, cache=own) + self.mlp(h) + (
                0 if read is None else self.cross(h, **read, cache=source)))
        x = self.residual(x, self.attn_norm, lambda h: self.attn(h, **look, cache=own))
        if read is not None:
            x = self.residual(x, self.cross_norm, lambda h: self.cross(h, **read, cache=source))
        return self.residual(x, self.mlp_norm, self.mlp)

# -----------------------------------------------------------------------------
# Stacks


class Embedding(nn.Module):
    """
    Token + position (+ segment): what goes into a stack. The token table is given, since models share it with other parts.
    """

    def __init__(self, config, tokens):
        super().__init__()
        self.tokens = tokens                                                           # nn.Embedding (V, C)
        self.scale = math.sqrt(config.n_embd) if config.scale_embedding else 1.0       # section 3.4 of [1]
        if config.positions == 'learned':
            self.positions = nn.Embedding(config.block_size, config.n_embd)
        elif config.positions == 'sinusoids':
            self.register_buffer('sinusoids', sinusoids(config.block_size, config.n_embd), persistent=False)
        self.segments = nn.Embedding(config.segments, config.n_embd) if config.segments else None
        self.norm = make_norm(config, config.n_embd) if config.embedding_norm else nn.Identity()
        self.drop = Dropout(config.dropout)

    def forward(self, ids, where, segments=None):
        """ids (B, T), where each token stands (1 or B, T), which text it is of (B, T; None: the first) -> (B, T, C)."""
        x = self.tokens(ids) * self.scale                                              # (B, T, C)
        if hasattr(self, 'positions'):
            x = x + self.positions(where)
        elif hasattr(self, 'sinusoids'):
            x = x + self.sinusoids[where]
        if self.segments is not None:
            x = x + self.segments(torch.zeros_like(ids) if segments is None else segments)
        return self.drop(self.norm(x))


def never_blind(keep, visible=None):
    """
    keep (B, S) -> a mask (B, 1, 1 or T, S). A query with nothing to see (all padding) would divide 0 by 0, and its NaN
    would reach every gradient: it may see everything instead. Nobody reads its answer.
    """
    if keep is None:
        return None
    mask = keep[:, None, None, :] if visible is None else keep[:, None, None, :] & visible
    return mask | ~mask.any(dim=-1, keepdim=True)


class Stack(nn.Module):
    """
    An embedding and n_layer blocks. causal=True: a decoder, where a token sees itself and the past (all of GPT).
    causal=False: an encoder, where everything sees everything. Both only as far as the windows say, which the blocks take in
    turn. cross=True: a decoder that also reads `memory`, the output of an encoder.
    """

    def __init__(self, config, tokens, causal, cross=False):
        super().__init__()
        self.causal, self.block_size, self.windows = causal, config.block_size, [int(n) for n in config.window.split()]
        self.embed = Embedding(config, tokens)
        self.blocks = nn.ModuleList(Block(config, cross) for _ in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd) if config.norm_first else nn.Identity()
        if config.positions == 'rotary':
            angles = rotary_angles(config.block_size, config.head_size, config.rope_theta, config.rope_scaling)
            self.register_buffer('cos', angles.cos(), persistent=False)
            self.register_buffer('sin', angles.sin(), persistent=False)
        elif config.positions == 'relative':
            self.distances = nn.Embedding(config.buckets, config.n_head)               # one table for all blocks
            self.max_distance = config.max_distance

    def forward(self, ids, keep=None, segments=None, memory=None, memory_keep=None, cache=None):
        """
        ids (B, T) -> hidden states (B, T, C). segments as in Embedding. keep (B, T) and memory_keep (B, S) are True at real
        tokens and False at padding; None: all are real. Positions count real tokens, so it does not matter on which side
        the padding lies.
        cache: an empty dict at first; the same dict later continues the sequence, and ids holds only what is new.
        Raises ValueError where the sequence outgrows block_size.
        """
        B, T = ids.shape
        past = cache.get('length', 0) if cache is not None else 0
        if past + T > self.block_size:
            raise ValueError(f"a sequence of {past + T} tokens is longer than block_size={self.block_size}: "
                             "shorten it, or train a model with a larger block_size")
        if cache is not None:
            cache['length'] = past + T
            if keep is not None or 'keep' in cache:  # what was padding stays padding
                old = cache.get('keep', torch.ones_like(ids[:, :1], dtype=torch.bool).expand(B, past))
                new = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep
                keep = cache['keep'] = torch.cat([old, new], dim=1)                    # (B, S)
        there = torch.arange(past + T, device=ids.device)[None] if keep is None else (keep.cumsum(dim=1) - 1).clamp(min=0)
        where = there[:, past:]                                                        # (1 or B, T) of (1 or B, S)

        turns = {}
        if hasattr(self, 'cos'):
            turns = {'rotary': (self.cos[where][:, None], self.sin[where][:, None])}   # 2 x (1 or B, 1, T, D/2)
        looks = {window: self.look(where, there, keep, window) | turns for window in set(self.windows)}
        read = None
        if memory is not None:
            read = {'context': memory, 'mask': never_blind(memory_keep)}

        x = self.embed(ids, where, segments)                                           # (B, T, C)
        for i, block in enumerate(self.blocks):
            look = looks[self.windows[i % len(self.windows)]]
            x = block(x, look, read, None if cache is None else cache.setdefault(i, {}))
        return self.norm(x)                                                            # (B, T, C)

    def look(self, where, there, keep, window):
        """Who sees whom, as attention is told it; the same for all blocks of one window. where and there as in `visible`."""
        mask = self.visible(where, there, keep, window)
        causal = mask is None and self.causal and where.size(1) > 1  # the kernel's own triangle; one new token may see all
        if hasattr(self, 'distances'):
            mask, causal = self.with_distances(mask, causal, where, there), False
        return {'mask': mask, 'causal': causal}

    def with_distances(self, mask, causal, where, there):
        """The mask of `visible` as scores to add, (1 or B, H, T, S): a learned number a distance, -inf where hidden."""
        distance = there[:, None, :] - where[:, :, None]                               # (1 or B, T, S)
        bias = self.distances(distance_buckets(distance, not self.causal, self.distances.num_embeddings,
                                               self.max_distance)).permute(0, 3, 1, 2)
        if causal:
            mask = (distance <= 0)[:, None]
        return bias if mask is None else bias.masked_fill(~mask, -math.inf)

    def visible(self, where, there, keep, window=0):
        """
        Which keys the T newest queries may see: bool (1 or B, 1, T or 1, S), or None where no mask is needed. where (1 or B,
        T) and there (1 or B, S): the positions of queries and keys. window: only keys less than so far away [20]; 0: all.
        """
        T, S = where.size(1), there.size(1)
        causal, near = self.causal and T > 1, 0 < window < S
        if keep is None and not near and not (causal and T < S):
            return None
        seen = None                                                                    # (1 or B, 1, T, S)
        if causal:
            # Query i stands at position S - T + i. is_causal would put query 0 beside key 0: wrong with a cache.
            seen = torch.ones(T, S, dtype=torch.bool, device=where.device).tril(S - T)[None, None]
        if near:
            close = ((where[:, :, None] - there[:, None, :]).abs() < window)[:, None]
            seen = close if seen is None else seen & close
        return seen if keep is None else never_blind(keep, seen)

# -----------------------------------------------------------------------------
# Models. Each maps a batch, given as keyword arguments, to (logits, loss).


def cross_entropy(logits, targets, count=None, smoothing=0.0):
    """
    The one loss of this project: whatever is asked is a choice among classes. logits (..., classes) against targets
    (...), with IGNORE where nothing is asked. The sum over asked targets, divided by `count`: their number here, unless
    the caller knows the number in the whole global batch (a mean of means would favour short rows). In nats. smoothing:
    the target gets 1 - smoothing of the probability, and all classes together the rest [17].
    """
    loss = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction='sum',
                           label_smoothing=smoothing)
    return loss / ((targets != IGNORE).sum().clamp(min=1) if count is None else count)


def loss_of(model, logits, targets, counts):
    """The cross entropy that forward() returns beside its logits: None without targets, smoothed while training."""
    smoothing = model.config.label_smoothing if model.training else 0.0
    return None if targets is None else cross_entropy(logits, targets, (counts or {}).get('targets'), smoothing)


def take(x, where):
    """One position of each row: x (B, T, C), where (B,) -> (B, C)."""
    return x[torch.arange(len(x), device=x.device), where]


def init_weights(model, config):
    """
    Weights start as normal draws around 0, with these standard deviations:

    gpt2     0.02; in the layers that write to the residual stream 0.02 / sqrt(2 n_layer): section 2.3 of [2]
    normal   0.02 everywhere (BERT, LLaMA)
    fan_in   1 / sqrt(inputs), and 1 in embeddings as they enter the stream: section 5 of [3]
    zero     fan_in, with zeros where a layer writes to the stream or to the logits: every block starts as "do nothing"
    """
    for name, p in model.named_parameters():
        if p.dim() < 2:
            if name.endswith('bias') or 'bias_' in name:  # nn.LSTM names its biases bias_ih_l0, ...
                nn.init.zeros_(p)
            continue  # the weights of norms stay at 1
        writes = name.endswith('proj.weight')
        if config.init == 'zero' and (writes or name.startswith('output.')):
            nn.init.zeros_(p)
        elif config.init in ('gpt2', 'normal'):
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if config.init == 'gpt2' and writes else 0.02)
        elif name.startswith('tokens.'):
            nn.init.normal_(p, std=config.n_embd ** -0.5 if config.scale_embedding else 1.0)
        else:
            nn.init.normal_(p, std=p.size(1) ** -0.5)
        if name.endswith('qkv.weight') and not config.scale_attention:  # queries start as small as the scale would make them
            with torch.no_grad():
                p[:config.n_head * config.head_size] *= config.head_size ** -0.5


class Output(nn.Module):
    """Hidden states -> logits: softmax(h W_eᵀ + b), where W_e is the embedding matrix itself or one of its own."""

    def __init__(self, config, tokens, bias=False):
        super().__init__()
        self.weight = tokens.weight if config.tied else nn.Parameter(torch.empty_like(tokens.weight))  # (V, C)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if bias else None
        self.scale = config.n_embd ** -0.5 if config.scale_output else 1.0
        self.cap = config.logit_cap

    def forward(self, x):
        logits = F.linear(x * self.scale, self.weight, self.bias)                      # (..., C) -> (..., V)
        return self.cap * torch.tanh(logits.float() / self.cap) if self.cap else logits


class GPT(nn.Module):
    """
    A language model, decoder only [2]: P(x) = product over t of P(x_t given x_<t). At every position it answers: which
    token comes next?
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.decoder = Stack(config, self.tokens, causal=True)
        self.output = Output(config, self.tokens)
        init_weights(self, config)

    def hidden(self, ids, keep=None, cache=None):
        """ids (B, T) -> (B, T, C). keep and cache as in Stack."""
        return self.decoder(ids, keep, cache=cache)

    def forward(self, ids, keep=None, targets=None, counts=None):
        """
        ids (B, T) -> logits (B, T, V), and the loss where targets (B, T) are given: targets[b, t] is the token after
        ids[b, t], already shifted. counts: {'targets': number of targets asked in the whole global batch}.
        """
        logits = self.output(self.hidden(ids, keep))                                   # (B, T, V)
        return logits, loss_of(self, logits, targets, counts)

    def decode(self, ids, keep=None, cache=None):
        """Logits of the token after the last one, (B, V): all that generation needs. Pads stand on the left."""
        return self.output(self.hidden(ids, keep, cache)[:, -1])


class LSTM(GPT):
    """
    What language models were before [8]: a state of fixed size walks over the text, and all of the past has to fit in
    it. Gates i, f, o = sigmoid and g = tanh of W x_t + U h_(t-1) + b; state c_t = f c_(t-1) + i g; output h_t = o tanh(c_t).
    The same questions and answers as in GPT, another `hidden`.
    """

    def __init__(self, config):
        nn.Module.__init__(self)  # GPT's own would build a decoder
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.lstm = nn.LSTM(config.n_embd, config.n_embd, config.n_layer, batch_first=True,
                            dropout=config.dropout if config.n_layer > 1 else 0.0)     # between its layers
        self.drop = Dropout(config.dropout)
        self.output = Output(config, self.tokens)
        init_weights(self, config)

    def hidden(self, ids, keep=None, cache=None):
        x = self.drop(self.tokens(ids))                                                # (B, T, C)
        state = cache.get('state') if cache is not None else None                      # 2 x (n_layer, B, C)
        if keep is None:
            x, state = self.lstm(x, state)
        else:  # a state would remember padding: move it to the right, end each row before it, and move back
            order = (~keep).int().argsort(dim=1, stable=True)[..., None].expand_as(x)  # real tokens first
            lengths = keep.sum(dim=1)
            packed = nn.utils.rnn.pack_padded_sequence(x.gather(1, order), lengths.clamp(min=1).cpu(), True,
                                                       enforce_sorted=False)
            packed, after = self.lstm(packed, state)
            x, _ = nn.utils.rnn.pad_packed_sequence(packed, True, total_length=ids.size(1))
            x = torch.zeros_like(x).scatter(1, order, x)
            before = state or [torch.zeros_like(t) for t in after]  # where all was padding, nothing has happened
            state = tuple(torch.where(lengths[None, :, None] > 0, new, old) for new, old in zip(after, before))
        if cache is not None:
            cache['state'] = state
        return self.drop(x)                                                            # (B, T, C)


class BERT(nn.Module):
    """
    An encoder [14]: every token sees every other, so it is not asked for the next one but for hidden ones (MLM), and
    whether its second text followed the first (NSP). `[CLS] A [SEP] B [SEP]` goes in; `[CLS]` gathers what is about all.
    """

    def __init__(self, config):
        super().__init__()
        C, self.config = config.n_embd, config
        self.tokens = nn.Embedding(config.vocab_size, C)
        self.encoder = Stack(config, self.tokens, causal=False)
        self.transform, self.transform_norm = nn.Linear(C, C), make_norm(config, C)
        self.act = ACTIVATIONS[config.activation]
        self.output = Output(config, self.tokens, bias=True)
        self.pooler = nn.Sequential(nn.Linear(C, C), nn.Tanh())
        self.is_next = nn.Linear(C, 2)  # class 1: B follows A. In Google's files 0 means that
        init_weights(self, config)

    def hidden(self, ids, keep=None, segments=None):
        """ids (B, T) -> (B, T, C). segments (B, T): 0 in the first text, 1 in the second."""
        return self.encoder(ids, keep, segments)

    def fill(self, x):
        """Hidden states -> which token belongs there: (..., C) -> (..., V)."""
        return self.output(self.transform_norm(self.act(self.transform(x))))

    def pool(self, x, keep=None):
        """Hidden states -> what [CLS], the first real token, has gathered: (B, T, C) -> (B, C)."""
        first = torch.zeros(len(x), dtype=torch.long, device=x.device) if keep is None else keep.int().argmax(dim=1)
        return self.pooler(take(x, first))

    def follows(self, x, keep=None):
        """Hidden states -> whether B follows A: (B, T, C) -> (B, 2), class 1 for yes."""
        return self.is_next(self.pool(x, keep))

    def forward(self, ids, segments=None, keep=None, targets=None, next_targets=None, counts=None):
        """
        ids (B, T) -> logits (B, T, V); with targets (B, T), of the N asked tokens alone, (N, V): the vocabulary is wide and
        six of seven tokens are not asked. The loss is that of targets plus that of next_targets (B,): section 3.1 of [14].
        """
        x, counts = self.hidden(ids, keep, segments), counts or {}                     # (B, T, C)
        if targets is not None:
            asked = targets != IGNORE
            logits = self.fill(x[asked])                                               # (N, V)
            loss = cross_entropy(logits, targets[asked], counts.get('targets'))
        else:
            logits, loss = self.fill(x), None                                          # (B, T, V)
        if next_targets is not None:
            follows = cross_entropy(self.follows(x, keep), next_targets, counts.get('next_targets'))
            loss = follows if loss is None else loss + follows
        return logits, loss


class EncoderDecoder(nn.Module):
    """
    The Transformer of 2017 [1], and T5 [15]: an encoder reads the source, every token seeing all of it; a decoder writes the
    target, each token seeing the target so far and, through cross-attention, the source. One matrix embeds both.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.encoder = Stack(config, self.tokens, causal=False)
        self.decoder = Stack(config, self.tokens, causal=True, cross=True)
        self.output = Output(config, self.tokens)
        init_weights(self, config)

    def hidden(self, ids, keep=None):
        """The source, ids (B, S) -> (B, S, C): what the decoder reads."""
        return self.encoder(ids, keep)

    def forward(self, ids, keep=None, decoder_ids=None, targets=None, counts=None):
        """
        Source ids (B, S), keep (B, S); decoder_ids (B, T): the target moved one to the right, behind a start token -> logits
        (B, T, V), and the loss where targets (B, T) are given. Padding behind a target needs no mask: nobody looks at it.
        """
        x = self.decoder(decoder_ids, memory=self.hidden(ids, keep), memory_keep=keep)  # (B, T, C)
        logits = self.output(x)                                                        # (B, T, V)
        return logits, loss_of(self, logits, targets, counts)

    def read(self, ids, keep=None):
        """Encode the source once: a cache to `decode` with."""
        return {'memory': self.hidden(ids, keep), 'memory_keep': keep}

    def decode(self, ids, keep=None, cache=None):
        """The newest target tokens (B, T) -> logits of the token after the last one, (B, V). cache: what `read` returned."""
        x = self.decoder(ids, keep, memory=cache['memory'], memory_keep=cache['memory_keep'], cache=cache)
        return self.output(x[:, -1])


class TaskModel(nn.Module):
    """
    A trunk that has read much, and one new Linear that asks it something: section 4 of [14], and of Radford et al. 2018.

    classify   one question a text: BERT is read at [CLS], a decoder at its last token, the only one that saw all
    tag        one question a token
    qa         two questions a text, over all of its tokens: where does the answer begin, where does it end?
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trunk = build(dataclasses.replace(config, task='', n_labels=0))
        self.drop = Dropout(config.dropout)
        self.head = nn.Linear(config.n_embd, 2 if config.task == 'qa' else config.n_labels)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def hidden(self, ids, keep=None, segments=None):
        """ids (B, T) -> (B, T, C). A trunk without segments does not ask for them."""
        return self.trunk.hidden(ids, keep, **({'segments': segments} if self.config.segments else {}))

    def forward(self, ids, segments=None, keep=None, targets=None, counts=None):
        """
        ids (B, T) -> logits, and the loss where targets are given: classify (B, L) against (B,), tag (B, T, L) against
        (B, T), qa (B, 2, T) against (B, 2), positions of the first and last token of the answer.
        """
        x = self.hidden(ids, keep, segments)                                           # (B, T, C)
        if self.config.task == 'classify':
            if isinstance(self.trunk, BERT):
                x = self.trunk.pool(x, keep)                                           # (B, C)
            else:
                real = torch.ones_like(ids) if keep is None else keep.int()
                last = (real * torch.arange(ids.size(1), device=ids.device)).argmax(dim=1)
                x = take(x, last)                                                      # (B, C)
        logits = self.head(self.drop(x))
        if self.config.task == 'qa':
            logits = logits.transpose(1, 2)                                            # (B, 2, T)
            if keep is not None:
                logits = logits.masked_fill(~keep[:, None], torch.finfo(logits.dtype).min)  # no answer in the padding
        return logits, loss_of(self, logits, targets, counts)

# -----------------------------------------------------------------------------
# From a configuration to a model, to a file, and back


def build(config):
    """A new model with random weights."""
    return TaskModel(config) if config.task else {
        'gpt': GPT, 'bert': BERT, 'encdec': EncoderDecoder, 'lstm': LSTM}[config.arch](config)


def write_file(path, write, keep=None):
    """
    Nobody ever sees half a file: write(f) fills a temporary one in the same folder (elsewhere the rename would not be
    one step), it is flushed to the disk, and takes the place of the old one, which stays under the name `keep`, if that is
    given. Raises OSError, the old file untouched.
    """
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        if keep and os.path.exists(path):
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        if isinstance(e, OSError) and e.filename == temporary:
            e.filename = path  # nobody has asked for the other name
        if isinstance(e, RuntimeError):  # how torch reports that its file could not be written, a full disk for one
            cause = e.__context__ if isinstance(e.__context__, OSError) else OSError(errno.EIO, 'cannot be written')
        elif isinstance(e, OSError) and not e.filename:  # which does not say where there was no room
            cause = e
        else:
            raise
        raise OSError(cause.errno, f'{cause.strerror}: make room, then go on', path) from e


def save(path, model, keep=None, **extra):
    """Write a checkpoint: tensors and plain data only, so that opening one never runs code. keep: as in write_file."""
    checkpoint = {'config': dataclasses.asdict(model.config), 'model': model.state_dict(), **extra}
    write_file(path, lambda f: torch.save(checkpoint, f), keep)


def load(path, device='cpu', **changes):
    """
    path -> (model, checkpoint). path is a checkpoint of ours or of nanoGPT, an out folder (its best.pt, else its ckpt.pt), a
    Hugging Face folder, or the name of one on the hub. `changes` are fields of Config that may differ from the file:
    dropout, or a smaller block_size. Raises FileNotFoundError where there is nothing, ValueError where it is not whole.
    """
    path = on_disk(os.fspath(path))
    if os.path.exists(os.path.join(path, 'config.json')):
        model, checkpoint = from_huggingface(path)
        return resized(model, path, **changes).to(device), checkpoint
    if os.path.isdir(path):
        files = [os.path.join(path, name) for name in ('best.pt', 'ckpt.pt')]
        found = [f for f in files if os.path.exists(f)]
        if not found:
            raise FileNotFoundError(f"{path} holds no best.pt and no ckpt.pt: train a model first, "
                                    f"python train.py --out_dir {path}")
        path = found[0]
    checkpoint = read_checkpoint(path, device)
    if 'model_args' in checkpoint:
        model, checkpoint = from_nanogpt(checkpoint, path)
        return resized(model, path, **changes).to(device), checkpoint
    try:
        trained = Config(**checkpoint['config'])
    except TypeError as e:
        raise ValueError(f"{path} has a configuration that this version does not know: {e!r}") from None
    labels, task = checkpoint.get('labels', [str(i) for i in range(trained.n_labels)]), checkpoint.get('task', '')
    fits = all(isinstance(label, str) for label in labels) and task in ('', 'seq2seq', trained.task)
    if not fits or (trained.task in ('classify', 'tag') and trained.n_labels != len(set(labels))):
        raise ValueError(f"{path} does not fit its own configuration: it has the task {task!r} and {len(labels)} labels")
    model = with_weights(trained, checkpoint['model'], path)
    return resized(model, path, **changes).to(device), checkpoint


def on_disk(path):
    """A name such as gpt2 or google/flan-t5-small -> its folder, fetched from the hub; a path on the disk stays as it is."""
    if os.path.exists(path) or not re.fullmatch(r'(\w[\w.-]*/)?\w[\w.-]*', path) or path.endswith('.pt'):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return path
    try:
        return snapshot_download(path, allow_patterns=['*.json', 'model*.safetensors', 'vocab.txt', 'merges.txt'])
    except Exception:  # no network, or no such model there: what is not on the disk is not there
        return path


class NoDraws(TorchFunctionMode):
    """Inside it modules are built without drawing weights that would be replaced at once."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.__name__ in ('normal_', 'uniform_', 'kaiming_uniform_'):  # of tensors, and of nn.init
            return args[0] if args else kwargs['tensor']
        return function(*args, **kwargs)


def shapes_of(config, path, n_tensors):
    """
    A model without memory: all shapes, no weights; but buffers, which are computed, are real. Raises ValueError where what
    describes it is absurd: files come from strangers.
    """
    if config.n_layer > n_tensors or config.block_size > 2 ** 22:
        raise ValueError(f"{path}: n_layer={config.n_layer}, block_size={config.block_size} cannot be: {n_tensors} tensors")
    try:
        with torch.device('meta'), NoDraws():
            return build(config)
    except (RuntimeError, TypeError):
        raise ValueError(f"{path}: a model of these sizes cannot be built") from None


def whole(t):
    """Whether all numbers of a tensor are there: one that is spread over many places costs a stranger nothing."""
    return t.layout == torch.strided and not t.is_meta and t.untyped_storage().nbytes() >= t.numel() * t.element_size()


def with_weights(config, weights, path):
    """
    A model made of given tensors {name: tensor}, which become its parameters; nothing is copied, and no random weights are
    drawn first. Raises ValueError naming the tensor that is missing, of another shape, or not part of the model.
    """
    model = shapes_of(config, path, len(weights))
    made, state, memory = {}, {}, set()
    for name, p in model.named_parameters(remove_duplicate=False):  # a tied weight has several names
        if id(p) in made:
            state[name] = made[id(p)]
            continue
        found = weights.get(name)
        if not (isinstance(found, torch.Tensor) and found.shape == p.shape and found.is_floating_point() and whole(found)):
            raise ValueError(f"{path} does not fit its own configuration: {name} should be a tensor of shape "
                             f"{tuple(p.shape)}, and is "
                             + (f'{tuple(found.shape)} of {found.dtype}' if isinstance(found, torch.Tensor) else 'missing'))
        found = found.float()
        if found.data_ptr() in memory:  # a pickle may hold one memory under two names
            found = found.clone()
        memory.add(found.data_ptr())
        state[name] = made[id(p)] = nn.Parameter(found)
    if unknown := [name for name in weights if name not in state]:
        raise ValueError(f"{path} does not fit its own configuration: {unknown[0]!r} is not part of the model")
    model.load_state_dict(state, assign=True)
    return model


def resized(model, path, **changes):
    """
    The same weights under other fields of Config: a shorter block_size forgets the far positions; a larger vocab_size adds
    tokens that are, but for a little noise, the mean of the old ones.
    """
    if not changes:
        return model
    if changes.get('block_size', 0) > model.config.block_size:
        raise ValueError(f"block_size={changes['block_size']} is longer than the {model.config.block_size} that {path} was "
                         "trained with: choose at most that")
    config, weights = dataclasses.replace(model.config, **changes), {}
    added = config.vocab_size - model.config.vocab_size
    for name, p in model.named_parameters():
        weights[name] = p = p.detach()
        if name.endswith('.positions.weight'):
            weights[name] = p[:config.block_size].clone()
        elif added and re.search(r'\b(tokens|output)\.', name):
            mean = p.mean(dim=0, keepdim=True)                                         # (1, C), or (1,) of a bias
            weights[name] = torch.cat([p, mean + 0.01 * torch.randn(added, *p.shape[1:], device=p.device)])
    return with_weights(config, weights, path)


# what a checkpoint of ours holds besides weights, of what kind
PARTS = {'settings': dict, 'labels': list, 'task': str, 'optimizer': list, 'scaler': dict, 'step': int, 'evaluated': int,
         'waited': int, 'best': float, 'best_loss': float, 'seconds': float}


def read_checkpoint(path, device='cpu'):
    """Open a file that `save` wrote, without running any code from it. Raises as `load` does."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no checkpoint {path}: train a model first, with python train.py. One of the hub "
                                "is fetched where huggingface_hub is installed and online; else download config.json, "
                                f"model.safetensors and the tokenizer from https://huggingface.co/{path} into a folder")
    with open(path, 'rb') as f, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(f) as parts:  # older files are not of this kind
                if any(part.compress_type for part in parts.infolist()):
                    raise ValueError("a checkpoint is never compressed")  # what is could unpack to anything
                if damaged := parts.testzip():  # the file holds checksums, which torch.load leaves alone
                    raise ValueError(f"{damaged} is damaged")
            f.seek(0)
            checkpoint = torch.load(f, map_location=device, weights_only=True)
        except Exception as e:  # damaged bytes can make the readers fail in any way
            raise ValueError(f"{path} is not a whole checkpoint ({type(e).__name__}): choose another one, or let "
                             "--init_from auto find the newest whole one") from None
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get('model_args', checkpoint.get('config')), dict)
            and isinstance(checkpoint.get('model'), dict)):
        raise ValueError(f"{path} is not a checkpoint of this project: it has no 'config' and 'model'")
    for key, kind in PARTS.items() if 'model_args' not in checkpoint else ():
        value = checkpoint.get(key, kind())
        right = isinstance(value, (int, float) if kind is float else kind)
        if not right or (key in ('step', 'seconds') and not 0 <= value < 1e18):
            raise ValueError(f"{path} is not a whole checkpoint: its {key!r} is {str(value)[:40]!r}")
    return checkpoint


def optimizer_groups(model, weight_decay):
    """
    The trainable weights in three groups, each weight in one: `matrices` (inside the blocks), `embeddings` (also
    output layers: one row a token or a label), `vectors` (biases, norms). Vectors do not decay: they are few.
    """
    tables = {id(m.weight) for name, m in model.named_modules()
              if isinstance(m, (nn.Embedding, Output)) or name.endswith(('head', 'is_next'))}
    groups = {'matrices': [], 'embeddings': [], 'vectors': []}
    for p in model.parameters():  # a tied weight comes once
        if p.requires_grad:
            groups['embeddings' if id(p) in tables else 'matrices' if p.dim() >= 2 else 'vectors'].append(p)
    return [{'name': name, 'params': params, 'weight_decay': 0.0 if name == 'vectors' else weight_decay}
            for name, params in groups.items() if params]

# -----------------------------------------------------------------------------
# Hugging Face's names for all of this. A family says what the fields of its config.json mean, and where each weight lies.
# The same tables serve both directions.


class Family(NamedTuple):
    preset: str     # the row that makes the choices which no field makes
    size: str       # the preset whose recipe suits to tune it
    classes: dict   # architecture -> task; the first is the one that is exported
    prefix: str     # stands before all names, except for what is on top of the trunk: `top`
    top: str
    fields: dict    # config.json -> (Config, value where the file says nothing)
    acts: dict      # activation, as config.json calls it -> as Config does
    names: dict     # module or weight of ours -> theirs; what ours has in one matrix may be several. {} is a block's number
    dropped: str    # what files hold besides: copies, and constants
    new: str = '$^'  # what a file may lack


def in_blocks(ours, theirs, names):
    """The names of one block's parts, with those of the block before them."""
    spell = lambda name: tuple(theirs + n for n in name) if isinstance(name, tuple) else theirs + name
    return {ours + key: spell(name) for key, name in names.items()}


def t5_blocks(stack, steps):
    """A T5 block is a list of layers; `steps` names ours in their order."""
    names = {'attn': ('SelfAttention.q', 'SelfAttention.k', 'SelfAttention.v'), 'attn.proj': 'SelfAttention.o',
             'cross': ('EncDecAttention.q', 'EncDecAttention.k', 'EncDecAttention.v'), 'cross.proj': 'EncDecAttention.o'}
    found = {f'{stack}.norm': f'{stack}.final_layer_norm',
             f'{stack}.distances': f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias'}
    for i, step in enumerate(steps):
        inside = {'mlp.fc': 'DenseReluDense.wi', 'mlp.proj': 'DenseReluDense.wo'} if step == 'mlp' else \
            {f'{step}.qkv': names[step], f'{step}.proj': names[f'{step}.proj']}
        found |= in_blocks(f'{stack}.blocks.{{}}.', f'{stack}.block.{{}}.layer.{i}.',
                           {f'{step}_norm': 'layer_norm', **inside})
    return found


FAMILIES = {
    'gpt2': Family(
        'gpt2', 'gpt2-124m', {'GPT2LMHeadModel': '', 'GPT2Model': ''}, 'transformer.', 'lm_head',
        {'vocab_size': ('vocab_size', 50257), 'n_positions': ('block_size', 1024), 'n_embd': ('n_embd', 768),
         'n_layer': ('n_layer', 12), 'n_head': ('n_head', 12), 'n_inner': ('mlp_dim', None),
         'activation_function': ('activation', 'gelu_new'), 'layer_norm_epsilon': ('norm_eps', 1e-5),
         'scale_attn_weights': ('scale_attention', True), 'tie_word_embeddings': ('tied', True)},
        {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu', 'relu': 'relu', 'relu2': 'relu2'},
        {'tokens': 'wte', 'decoder.embed.positions': 'wpe', 'decoder.norm': 'ln_f', 'output': 'lm_head',
         **in_blocks('decoder.blocks.{}.', 'h.{}.', {
             'attn_norm': 'ln_1', 'attn.qkv': 'attn.c_attn', 'attn.proj': 'attn.c_proj', 'mlp_norm': 'ln_2',
             'mlp.fc': 'mlp.c_fc', 'mlp.proj': 'mlp.c_proj'})},
        r'h\.\d+\.attn\.(masked_)?bias|lm_head\.weight'),
    'bert': Family(
        'bert', 'bert-base', {
            'BertForPreTraining': '', 'BertForMaskedLM': '', 'BertForNextSentencePrediction': '', 'BertModel': '',
            'BertForSequenceClassification': 'classify', 'BertForTokenClassification': 'tag',
            'BertForQuestionAnswering': 'qa'}, 'bert.', 'cls|classifier|qa_outputs',
        {'vocab_size': ('vocab_size', 30522), 'max_position_embeddings': ('block_size', 512), 'hidden_size': ('n_embd', 768),
         'num_hidden_layers': ('n_layer', 12), 'num_attention_heads': ('n_head', 12), 'intermediate_size': ('mlp_dim', 3072),
         'hidden_act': ('activation', 'gelu'), 'layer_norm_eps': ('norm_eps', 1e-12), 'type_vocab_size': ('segments', 2),
         'tie_word_embeddings': ('tied', True)},
        {'gelu': 'gelu', 'relu': 'relu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'relu2': 'relu2'},
        {'tokens': 'embeddings.word_embeddings', 'encoder.embed.positions': 'embeddings.position_embeddings',
         'encoder.embed.segments': 'embeddings.token_type_embeddings', 'encoder.embed.norm': 'embeddings.LayerNorm',
         **in_blocks('encoder.blocks.{}.', 'encoder.layer.{}.', {
             'attn.qkv': ('attention.self.query', 'attention.self.key', 'attention.self.value'),
             'attn.proj': 'attention.output.dense', 'attn_norm': 'attention.output.LayerNorm',
             'mlp.fc': 'intermediate.dense', 'mlp.proj': 'output.dense', 'mlp_norm': 'output.LayerNorm'}),
         'pooler.0': 'pooler.dense', 'transform': 'cls.predictions.transform.dense',
         'transform_norm': 'cls.predictions.transform.LayerNorm', 'output.weight': 'cls.predictions.decoder.weight',
         'output.bias': 'cls.predictions.bias', 'is_next': 'cls.seq_relationship', 'head': 'classifier'},
        r'embeddings\.position_ids|cls\.predictions\.(decoder\.)?(weight|bias)', r'pooler\..*|cls\..*'),
    't5': Family(
        't5', 't5-small', {'T5ForConditionalGeneration': '', 'T5WithLMHeadModel': '', 'T5Model': ''}, '', 'lm_head',
        {'vocab_size': ('vocab_size', 32128), 'n_positions': ('block_size', 512), 'd_model': ('n_embd', 512),
         'd_kv': ('head_dim', 64), 'd_ff': ('mlp_dim', 2048), 'num_layers': ('n_layer', 6), 'num_heads': ('n_head', 8),
         'relative_attention_num_buckets': ('buckets', 32), 'relative_attention_max_distance': ('max_distance', 128),
         'layer_norm_epsilon': ('norm_eps', 1e-6), 'feed_forward_proj': ('activation', 'relu'),
         'scale_decoder_outputs': ('scale_output', True)},
        {'relu': 'relu', 'gated-gelu': 'geglu', 'gated-silu': 'swiglu', 'gelu_new': 'gelu_tanh', 'gelu': 'gelu',
         'relu2': 'relu2'},
        {'tokens': 'shared', **t5_blocks('encoder', ['attn', 'mlp']), **t5_blocks('decoder', ['attn', 'cross', 'mlp']),
         'output': 'lm_head'},
        r'(en|de)coder\.embed_tokens\.weight|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight'),
    'llama': Family(
        'llama', 'llama-7b', {'LlamaForCausalLM': '', 'LlamaModel': ''}, 'model.', 'lm_head',
        {'vocab_size': ('vocab_size', 32000), 'max_position_embeddings': ('block_size', 2048),
         'hidden_size': ('n_embd', 4096), 'num_hidden_layers': ('n_layer', 32), 'num_attention_heads': ('n_head', 32),
         'head_dim': ('head_dim', None), 'num_key_value_heads': ('n_kv_head', None), 'intermediate_size': ('mlp_dim', 11008),
         'hidden_act': ('activation', 'silu'), 'rms_norm_eps': ('norm_eps', 1e-6), 'attention_bias': ('bias', False),
         'rope_theta': ('rope_theta', 10000.0), 'tie_word_embeddings': ('tied', False)},
        {'silu': 'swiglu', 'swish': 'swiglu', 'gelu_pytorch_tanh': 'geglu', 'gelu_new': 'geglu'},
        {'tokens': 'embed_tokens', 'decoder.norm': 'norm', 'output': 'lm_head',
         **in_blocks('decoder.blocks.{}.', 'layers.{}.', {
             'attn_norm': 'input_layernorm', 'attn.qkv': ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
             'attn.proj': 'self_attn.o_proj', 'mlp_norm': 'post_attention_layernorm',
             'mlp.fc': ('mlp.gate_proj', 'mlp.up_proj'), 'mlp.proj': 'mlp.down_proj'})},
        r'.*rotary_emb\.inv_freq|lm_head\.weight'),
}
FAMILIES['mistral'] = FAMILIES['llama']._replace(  # [21]: Llama with a window, and never a bias
    classes={'MistralForCausalLM': '', 'MistralModel': ''},
    fields={name: field for name, field in FAMILIES['llama'].fields.items() if name != 'attention_bias'} | {
        'max_position_embeddings': ('block_size', 131072), 'num_key_value_heads': ('n_kv_head', 8),
        'intermediate_size': ('mlp_dim', 14336), 'sliding_window': ('window', 4096)})
# Fields of config.json that change nothing of what a model computes. One that stands neither here nor in its family is
# refused, unless it is off (None, False, empty).
HARMLESS = re.compile(
    r'_.*|architectures|model_type|transformers_version|(torch_)?dtype|.*token_id|.*drop(out)?(_prob|_rate)?|initializer_\w+|'
    r'use_cache|summary_\w+|task_specific_params|id2label|label2id|num_labels|finetuning_task|return_dict\w*|output_\w+|'
    r'gradient_checkpointing|pooler_\w+|directionality|n_ctx|pretraining_tp|is_encoder_decoder|reorder_and_upcast_attn|'
    r'(max|min)_length|do_sample|early_stopping|num_(beams|beam_groups|return_sequences)|temperature|top_[kp]|typical_p|'
    r'(repetition|length|diversity)_penalty|(encoder_)?no_repeat_ngram_size|model_max_length|chunk_size_feed_forward|'
    r'dense_act_fn|is_gated_act|tokenizer_class|prefix|attn_implementation|classifier_dropout|tf_legacy_loss|name_or_path|'
    r'max_sequence_length|transformers\.js_config')
ROPE = {'default': [], 'linear': ['factor'],
        'llama3': ['factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings']}
ONLY = {'is_llama_config': True, 'position_embedding_type': 'absolute', 'partial_rotary_factor': 1.0,
        'problem_type': 'single_label_classification'}


def config_from(theirs, where):
    """What a config.json means: (family, architecture, Config). Raises ValueError naming a field that cannot be honoured."""
    def check(holds, name, remedy):
        if not holds:
            raise ValueError(f"{where}: {name}={theirs.get(name)!r} is not supported here: {remedy}")

    check(isinstance(theirs.get('model_type'), str) and theirs['model_type'] in FAMILIES, 'model_type',
          f"choose a folder of {', '.join(FAMILIES)}")
    family = FAMILIES[theirs['model_type']]
    named = theirs.get('architectures') or list(family.classes)
    check(isinstance(named, list) and str(named[0]) in family.classes, 'architectures',
          f"choose one of {', '.join(family.classes)}")
    values = {ours: default if theirs.get(name) is None else theirs[name] for name, (ours, default) in family.fields.items()}
    values = {ours: 0 if value is None else value for ours, value in values.items()}
    name = next(name for name, (ours, _) in family.fields.items() if ours == 'activation')
    check(str(values['activation']) in family.acts, name, f"choose one of {', '.join(family.acts)}")
    values['activation'] = family.acts[values['activation']]
    special = set(family.fields)
    if family.preset == 't5':
        special |= {'tie_word_embeddings', 'num_decoder_layers'}
        check(theirs.get('num_decoder_layers') in (None, values['n_layer']), 'num_decoder_layers', "as many as num_layers")
        if 'scale_decoder_outputs' not in theirs:
            values['scale_output'] = theirs.get('tie_word_embeddings') is not False
    if family.preset == 'llama':
        special |= {'rope_parameters', 'rope_scaling'}
        for field in ('rope_scaling', 'rope_parameters'):
            check(isinstance(theirs.get(field) or {}, dict), field, "it should be a dict")
        rope = {**(theirs.get('rope_scaling') or {}), **(theirs.get('rope_parameters') or {})}
        kind, field = rope.get('rope_type', rope.get('type', 'default')), next(
            (f for f in ('rope_parameters', 'rope_scaling') if theirs.get(f)), 'rope_parameters')
        values['rope_theta'] = rope.get('rope_theta', values['rope_theta'])
        check(str(kind) in ROPE and all(n in rope for n in ROPE[kind]) and rope.get('partial_rotary_factor', 1.0) == 1.0,
              field, f"choose one of {', '.join(ROPE)}")
        values['rope_scaling'] = '' if kind == 'default' else ' '.join([kind, *(str(rope[n]) for n in ROPE[kind])])
    if 'attention_bias' in family.fields:
        special |= {'mlp_bias'}
        values['bias'] = bool(values['bias'] or theirs.get('mlp_bias'))  # those that a file lacks are 0
    if 'sliding_window' in family.fields:
        n = theirs.get('sliding_window', values['window'])
        check(n is None or (type(n) is int and n > 0), 'sliding_window', "it should be a number of tokens, or null")
        values['window'] = str(n or 0)
    for name, value in theirs.items():
        check(name in special or HARMLESS.fullmatch(name) or value in (None, False, '', [], {}, ONLY.get(name)), name,
              "leave it out if the weights do not need it")
    return family, named[0], dataclasses.replace(PRESETS[family.preset], **values)


def their_names(family, config, name):
    """What a weight of ours is called there; of several names, ours holds all on top of each other."""
    number = re.search(r'\.blocks\.(\d+)\.', name)
    pattern = re.sub(r'\.blocks\.\d+\.', '.blocks.{}.', name.removeprefix('trunk.'))
    module, _, end = pattern.rpartition('.')
    found = family.names[pattern] if pattern in family.names else family.names[module]
    names = [n if pattern in family.names else f'{n}.{end}' for n in ([found] if isinstance(found, str) else found)]
    if config.activation in ('geglu', 'swiglu') and names[0].endswith('.wi.weight'):
        names = [names[0].replace('.wi.', f'.wi_{i}.') for i in (0, 1)]
    if config.task == 'qa':
        names = [re.sub(r'^classifier\b', 'qa_outputs', n) for n in names]
    if not config.tied:
        names = [n.replace('cls.predictions.bias', 'cls.predictions.decoder.bias') for n in names]
    return [n.replace('{}', number[1]) if number else n for n in names]


def turned(family, name, p):
    """GPT-2's files have the matrices of a block as (inputs, outputs); Google's class 0 of two texts is our class 1."""
    if family.preset == 'gpt2' and re.search(r'\.c_\w+\.weight$', name):
        return p.mT if p.dim() > 1 else p
    return p.flip(0) if name.startswith('cls.seq_relationship') and p.dim() else p


def rows_of(config, names, total):
    """How many rows of ours each of several names has: query, key and value differ where heads are shared."""
    return [config.head_size * n for n in (config.n_head, config.kv_heads, config.kv_heads)] if len(names) == 3 else \
        [total // len(names)] * len(names)


def open_tensors(folder):
    """{name: function that reads the tensor} of all weights in a folder. Raises ValueError where they cannot be read."""
    path = lambda name: os.path.join(folder, name)
    found = {}
    try:
        if os.path.exists(path('model.safetensors.index.json')):
            with open(path('model.safetensors.index.json'), encoding='utf-8') as f:
                files = sorted(set(json.load(f)['weight_map'].values()))
            if any(os.path.basename(name) != name for name in files):
                raise LookupError("the index names a file outside of the folder")
        else:
            files = [name for name in ('model.safetensors', 'pytorch_model.bin') if os.path.exists(path(name))][:1]
        for name in files:
            if name.endswith('.bin'):
                weights = torch.load(path(name), map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path(name)))
                if not all(isinstance(k, str) and isinstance(t, torch.Tensor) and whole(t) for k, t in weights.items()):
                    raise ValueError(f"{path(name)} holds something other than tensors: fetch it again")
                found |= {key: functools.partial(weights.pop, key) for key in weights}
                continue
            try:
                from safetensors import safe_open
            except ImportError:
                raise ValueError(f"{path(name)} needs one more package: pip install safetensors") from None
            f = safe_open(path(name), framework='pt')
            found |= {key: functools.partial(f.get_tensor, key) for key in f.keys()}
    except Exception as e:  # damaged bytes can make the readers fail in any way
        if str(e).startswith(folder):
            raise
        raise ValueError(f"{folder}: its weights cannot be read ({type(e).__name__}: {' '.join(str(e).split())[:100]}): "
                         "fetch them again") from None
    if not found:
        raise ValueError(f"{folder} has a config.json, but neither model.safetensors nor pytorch_model.bin: fetch the "
                         "weights too")
    return found


def from_huggingface(folder):
    """
    A Hugging Face folder -> (model, checkpoint). The checkpoint's `dropped` lists the tensors that were left out on purpose,
    `new` the weights of ours that the folder lacks: a bare BERT has no head for masked tokens; `folder` is where the files
    lie. Raises ValueError naming the field or tensor that does not fit.
    """
    where = os.path.join(folder, 'config.json')
    try:
        with open(where, encoding='utf-8') as f:
            theirs = json.load(f)
        theirs.get('model_type')
    except (ValueError, AttributeError, RecursionError) as e:
        raise ValueError(f"{where} is damaged ({e}): fetch it again") from None
    family, architecture, config = config_from(theirs, where)
    task, labels = family.classes[architecture], []
    spell = lambda name: name.removeprefix(family.prefix).replace('.gamma', '.weight').replace('.beta', '.bias')
    files = {spell(name): read for name, read in open_tensors(folder).items()}
    if family.preset == 't5':
        config = dataclasses.replace(config, tied='lm_head.weight' not in files)
    one, other = 'cls.predictions.bias', 'cls.predictions.decoder.bias'
    if (one in files) != (other in files) and family.preset == 'bert':  # some files have it once, by either name
        have, lack = (one, other) if one in files else (other, one)
        if (lack == one) == config.tied:
            files[lack] = files.pop(have)
    if task in ('classify', 'tag'):
        named = theirs.get('id2label') or {'0': 'LABEL_0', '1': 'LABEL_1'}
        if not isinstance(named, dict) or not all(re.fullmatch(r'[0-9]+', key) for key in named):
            raise ValueError(f"{where}: id2label={named!r} should name a label for each number")
        labels = [str(named[key]) for key in sorted(named, key=int)]
    if task:
        config = dataclasses.replace(config, task=task, n_labels=len(labels))
    weights, new = {}, []
    expected = dict(shapes_of(config, where, len(files)).named_parameters())
    for name, p in expected.items():
        names = their_names(family, config, name)
        missing = [n for n in names if n not in files]
        if missing and re.fullmatch(family.new, names[0]):
            weights[name] = torch.empty(p.shape).normal_(std=0.02) if p.dim() > 1 else torch.full(
                p.shape, float(name.endswith('norm.weight')))
            new.append(name)
            continue
        if missing and name.endswith('.bias') and family.preset == 'llama' and not theirs.get(
                'mlp_bias' if '.mlp.' in name else 'attention_bias'):
            weights[name] = torch.zeros(p.shape)
            continue
        if missing:
            raise ValueError(f"{folder}: the tensor {missing[0]} is missing, of which {name} is made")
        parts = [turned(family, n, files.pop(n)()) for n in names]
        rows = rows_of(config, names, len(p))
        if [part.shape for part in parts] != [(n, *p.shape[1:]) for n in rows]:
            raise ValueError(f"{folder}: {' + '.join(names)} should make {name} of shape {tuple(p.shape)}, and "
                             f"{'is' if len(parts) == 1 else 'are'} {' + '.join(str(tuple(q.shape)) for q in parts)}")
        weights[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    if unexpected := [name for name in files if not re.fullmatch(family.dropped, name)]:
        raise ValueError(f"{folder}: the tensor {unexpected[0]} is not part of a {architecture} as config.json describes it")
    checkpoint = {'config': dataclasses.asdict(config), 'task': task, 'labels': labels, 'settings': {'preset': family.size},
                  'dropped': sorted(files), 'new': new, 'folder': folder}
    return with_weights(config, weights, folder), checkpoint


def from_nanogpt(checkpoint, path):
    """A ckpt.pt of nanoGPT -> (model, checkpoint). Its names are those of GPT-2's files, its matrices lie as ours."""
    sizes, family = checkpoint['model_args'], FAMILIES['gpt2']
    try:
        config = dataclasses.replace(PRESETS['gpt2'], activation='gelu', **{
            name: sizes[name] for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size')})
    except (KeyError, TypeError) as e:
        raise ValueError(f"{path} looks like a checkpoint of nanoGPT, but its model_args are not whole ({e!r})") from None
    found = {name.removeprefix('_orig_mod.').removeprefix('transformer.'): p for name, p in checkpoint['model'].items()}
    expected = dict(shapes_of(config, path, len(found)).named_parameters())
    ours = {their_names(family, config, name)[0]: name for name in expected}
    weights = {ours.get(name, name): p for name, p in found.items() if not re.fullmatch(family.dropped, name)}
    return with_weights(config, weights, path), {'config': dataclasses.asdict(config), 'settings': {'preset': family.size}}


def config_to(kind, config):
    """A Config as the config.json of a family; what it cannot express is None, or lost: `config_from` tells."""
    family, acts = FAMILIES[kind], {}
    for theirs, ours in family.acts.items():
        acts.setdefault(ours, theirs)
    about = {'model_type': kind, 'dtype': 'float32',
             'architectures': [next((name for name, task in family.classes.items() if task == config.task), None)]}
    for theirs, (ours, _) in family.fields.items():
        about[theirs] = acts.get(config.activation) if ours == 'activation' else getattr(config, ours)
    if kind == 't5':
        about |= {'num_decoder_layers': config.n_layer, 'is_encoder_decoder': True, 'tie_word_embeddings': config.tied}
    if family.preset == 'llama':
        scaling, *numbers = config.rope_scaling.split() or ['default']
        about |= {'rope_parameters': {
            'rope_type': scaling, 'rope_theta': config.rope_theta, **dict(zip(ROPE[scaling], map(float, numbers)))}}
    if 'attention_bias' in about:
        about['mlp_bias'] = config.bias
    if 'sliding_window' in about:  # one for all blocks
        about['sliding_window'] = int(config.window) or None if config.window.isdigit() else None
    return about


def export_huggingface(model, folder, vocab_size=None, **fields):
    """
    Write a folder that the classes of transformers load: config.json and model.safetensors. Only the first vocab_size tokens
    [all] go with it; `fields` go into config.json: ids of special tokens, id2label. Raises ValueError where no class there
    computes what this model does, naming the choices that stand in the way, or where the folder holds something already.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("this needs one more package: pip install safetensors") from None
    config = dataclasses.replace(model.config, n_kv_head=model.config.kv_heads, head_dim=model.config.head_size,
                                 mlp_dim=model.config.mlp_dim or 4 * model.config.n_embd,
                                 vocab_size=vocab_size or model.config.vocab_size)
    if config.vocab_size > model.config.vocab_size:
        raise ValueError(f"vocab_size={vocab_size} is more than the {model.config.vocab_size} tokens of the model")
    obstacles = {}
    for kind in FAMILIES:
        if config.task and config.task not in FAMILIES[kind].classes.values():
            obstacles[kind] = [f'arch={config.arch} with task={config.task}']
            continue
        try:
            family, _, back = config_from(config_to(kind, config), kind)
        except ValueError as e:
            obstacles[kind] = [str(e)]
            continue
        back = dataclasses.replace(back, n_kv_head=back.kv_heads, head_dim=back.head_size, tied=config.tied)
        free = {'dropout', 'label_smoothing', 'init', 'task', 'n_labels', *(['bias'] if kind in ('gpt2', 'bert') else [])}
        obstacles[kind] = [f'{f.name}={getattr(config, f.name)}' for f in dataclasses.fields(Config)
                           if f.name not in free and getattr(back, f.name) != getattr(config, f.name)]
        if not obstacles[kind]:
            break
    else:
        kind = min(obstacles, key=lambda kind: len(obstacles[kind]))
        raise ValueError(f"no class of transformers computes what this model does: {kind} comes nearest, but for "
                         + ', '.join(obstacles[kind]))
    if os.path.isdir(folder) and os.listdir(folder):
        raise ValueError(f"{folder} exists and is not empty: choose another name")

    tensors, have = {}, dict(model.named_parameters())
    expected = dict(shapes_of(dataclasses.replace(config, bias=back.bias), folder, len(have)).named_parameters())
    for name, shape in expected.items():
        p = have[name].detach()[:len(shape)] if name in have else torch.zeros(shape.shape)  # no bias is one of 0
        names = their_names(family, config, name)
        if config.task and re.match(r'cls\.' if config.task == 'classify' else r'cls\.|pooler\.', names[0]):
            continue  # a model with a head of its own has no other
        if names == ['cls.predictions.decoder.bias']:
            tensors['cls.predictions.bias'] = p.cpu().clone()  # nobody reads it, but it is asked for
        for theirs, part in zip(names, p.split(rows_of(config, names, len(p)))):
            full = theirs if re.match(family.top, theirs) else family.prefix + theirs
            tensors[full] = turned(family, theirs, part).cpu().clone(memory_format=torch.contiguous_format)
    about = config_to(kind, config)
    if config.task in ('classify', 'tag'):
        about['id2label'] = {str(i): f'LABEL_{i}' for i in range(config.n_labels)}
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, 'model.safetensors')

    def write(f):
        try:
            save_file(tensors, f.name, metadata={'format': 'pt'})
        except Exception as e:  # how safetensors reports a full disk
            raise OSError(errno.EIO, f'cannot be written ({e})', path) from None

    write_file(path, write)
    about = json.dumps(about | fields, ensure_ascii=False, indent=1).encode()
    write_file(os.path.join(folder, 'config.json'), lambda f: f.write(about))
    os.chmod(path, os.stat(os.path.join(folder, 'config.json')).st_mode)  # safetensors lets nobody else read its files
