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
"""

import dataclasses
import errno
import math
import os
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

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
            if kind is float and type(value) is int:
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
    position = torch.arange(length)[:, None]                                           # (T, 1)
    speed = 10000.0 ** (-torch.arange(0, channels, 2) / channels)                      # (C/2,)
    return torch.stack([(position * speed).sin(), (position * speed).cos()], dim=2).flatten(1)


def rotary_angles(length, channels, theta):
    """How far each pair of channels has turned at each position, in radians: section 3.2 of [5]. Returns (T, D/2)."""
    speed = theta ** (-torch.arange(0, channels, 2) / channels)                        # (D/2,)
    return torch.arange(length)[:, None] * speed


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
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)

# -----------------------------------------------------------------------------
# Attention


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
    scores = q @ k.transpose(-2, -1) * (q.size(-1) ** -0.5 if scale is None else scale)  # (B, H, T, S)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1)


def attention(q, k, v, mask=None, causal=False, scale=None, dropout=0.0):
    """
    z_i = sum_j weight_ij v_j: attention_weights @ v, by whichever of two roads is faster; they agree up to rounding.
    q (B, H, T, D), k and v (B, G, S, D), where each of the G key/value heads serves H/G query heads [7].
    """
    # Measured on a CPU with bfloat16 at 256 positions: the fused kernel's backward made a training step 1.3 times
    # slower than the plain formula. Long sequences still need it: the plain formula stores all T x S weights.
    plain = q.is_cpu and q.dtype == torch.bfloat16 and torch.is_grad_enabled() and k.size(2) <= 512
    mask = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
    if not plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale,
                                              dropout_p=dropout, enable_gqa=k.size(1) < q.size(1))
    if k.size(1) < q.size(1):
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))    # (B, H, S, D)
    return F.dropout(attention_weights(q, k, mask, causal, scale), dropout) @ v


def make_norm(config, channels):
    """
    LayerNorm [9]: (x - mean) / sqrt(var + eps) * w + b, over the channels of one position.
    RMSNorm [10]:  x / sqrt(mean of x² + eps) * w.
    """
    if config.norm == 'layernorm':
        return nn.LayerNorm(channels, config.norm_eps, elementwise_affine=config.norm_weight, bias=config.bias)
    return nn.RMSNorm(channels, config.norm_eps, elementwise_affine=config.norm_weight)


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
        self.qkv = nn.Linear(config.n_embd, (H + 2 * G) * D, config.bias)              # one product, not three
        self.proj = nn.Linear(H * D, config.n_embd, config.bias)
        self.q_norm, self.k_norm = (make_norm(config, D) if config.qk_norm else nn.Identity() for _ in 'qk')
        self.dropout, self.scale = config.dropout, None if config.scale_attention else 1.0

    def project(self, x, rows):
        """Some rows of the packed matrix: x (B, T, C) -> heads (B, rows/D, T, D)."""
        bias = None if self.qkv.bias is None else self.qkv.bias[rows]
        return F.linear(x, self.qkv.weight[rows], bias).unflatten(-1, (-1, self.sizes[2])).transpose(1, 2)

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
                k, v = remember(cache, k, v)                                           # (B, G, S, D)
        else:
            q = self.q_norm(self.project(x, slice(0, H * D)))                          # (B, H, T, D)
            if cache:
                k, v = cache['k'], cache['v']
            else:
                k, v = self.project(context, slice(H * D, None)).chunk(2, dim=1)       # 2 x (B, G, S, D)
                k = self.k_norm(k)
                if cache is not None:
                    cache.update(k=k, v=v)
        y = attention(q, k, v, mask, causal, self.scale, self.dropout if self.training else 0.0)
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
        self.drop = nn.Dropout(config.dropout)

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
        self.drop = nn.Dropout(config.dropout)

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
    causal=False: an encoder, where everything sees everything. cross=True: a decoder that also reads `memory`, the
    output of an encoder.
    """

    def __init__(self, config, tokens, causal, cross=False):
        super().__init__()
        self.causal, self.block_size = causal, config.block_size
        self.embed = Embedding(config, tokens)
        self.blocks = nn.ModuleList(Block(config, cross) for _ in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd) if config.norm_first else nn.Identity()
        if config.positions == 'rotary':
            angles = rotary_angles(config.block_size, config.head_size, config.rope_theta)
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
        if keep is None:
            where = torch.arange(past, past + T, device=ids.device)[None]              # (1, T)
        else:
            where = (keep.cumsum(dim=1) - 1).clamp(min=0)[:, past:]                    # (B, T)

        look = {'mask': self.visible(T, past, keep, ids.device), 'causal': False}
        if look['mask'] is None:  # then the kernel draws the triangle by itself; one new token may see all
            look['causal'] = self.causal and T > 1
        if hasattr(self, 'distances'):
            look = {'mask': self.with_distances(look['mask'], look['causal'], where, past, keep), 'causal': False}
        if hasattr(self, 'cos'):
            look['rotary'] = self.cos[where][:, None], self.sin[where][:, None]        # 2 x (1 or B, 1, T, D/2)
        read = None
        if memory is not None:
            read = {'context': memory, 'mask': never_blind(memory_keep)}

        x = self.embed(ids, where, segments)                                           # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, look, read, None if cache is None else cache.setdefault(i, {}))
        return self.norm(x)                                                            # (B, T, C)

    def with_distances(self, mask, causal, where, past, keep):
        """The mask of `visible` as scores to add, (1 or B, H, T, S): a learned number a distance, -inf where hidden."""
        there = torch.arange(past + where.size(1), device=where.device)[None] if keep is None else keep.cumsum(dim=1) - 1
        distance = there[:, None, :] - where[:, :, None]                               # (1 or B, T, S)
        bias = self.distances(distance_buckets(distance, not self.causal, self.distances.num_embeddings,
                                               self.max_distance)).permute(0, 3, 1, 2)
        if causal:
            mask = (distance <= 0)[:, None]
        return bias if mask is None else bias.masked_fill(~mask, -math.inf)

    def visible(self, T, past, keep, device):
        """Which keys the T newest queries may see: bool (1 or B, 1, T or 1, S), or None where no mask is needed."""
        if keep is None and not (self.causal and past and T > 1):
            return None
        mask = never_blind(keep)                                                       # (B, 1, 1, S)
        if self.causal and T > 1:
            # Query i stands at position past + i. is_causal would put query 0 beside key 0: wrong with a cache.
            triangle = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)[None, None]
            mask = triangle if mask is None else never_blind(keep, triangle)
        return mask

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
        self.drop = nn.Dropout(config.dropout)
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
        self.transform = nn.Sequential(nn.Linear(C, C), nn.GELU(), make_norm(config, C))
        self.output = Output(config, self.tokens, bias=True)
        self.pooler = nn.Sequential(nn.Linear(C, C), nn.Tanh())
        self.is_next = nn.Linear(C, 2)  # class 1: B follows A. In Google's files 0 means that
        init_weights(self, config)

    def hidden(self, ids, keep=None, segments=None):
        """ids (B, T) -> (B, T, C). segments (B, T): 0 in the first text, 1 in the second."""
        return self.encoder(ids, keep, segments)

    def fill(self, x):
        """Hidden states -> which token belongs there: (..., C) -> (..., V)."""
        return self.output(self.transform(x))

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
        self.drop = nn.Dropout(config.dropout)
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


def write_file(path, write):
    """
    Nobody ever sees half a file: write(f) fills a temporary one in the same folder (elsewhere the rename would not be
    one step), it is flushed to the disk, and takes the place of the old one. Raises OSError, the old file untouched.
    """
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        if isinstance(e, RuntimeError):  # how torch reports that its file could not be written, a full disk for one
            cause = e.__context__ if isinstance(e.__context__, OSError) else OSError(errno.EIO, 'cannot be written')
            raise OSError(cause.errno, f'{cause.strerror}: make room, then go on', path) from e
        raise


def save(path, model, **extra):
    """Write a checkpoint: tensors and plain data only, so that opening one never runs code."""
    checkpoint = {'config': dataclasses.asdict(model.config), 'model': model.state_dict(), **extra}
    write_file(path, lambda f: torch.save(checkpoint, f))


def load(path, device='cpu', **changes):
    """
    path -> (model, checkpoint). path is a checkpoint or an out folder (its best.pt, else its ckpt.pt). `changes` are
    fields of Config that may differ from the file: dropout, or a smaller block_size. Raises FileNotFoundError where
    there is nothing, ValueError where it is not a whole checkpoint of ours.
    """
    if os.path.isdir(path):
        files = [os.path.join(path, name) for name in ('best.pt', 'ckpt.pt')]
        found = [f for f in files if os.path.exists(f)]
        if not found:
            raise FileNotFoundError(f"{path} holds no best.pt and no ckpt.pt: train a model first, "
                                    f"python train.py --out_dir {path}")
        path = found[0]
    checkpoint = read_checkpoint(path, device)
    try:
        trained = Config(**checkpoint['config'])
    except TypeError as e:
        raise ValueError(f"{path} has a configuration that this version does not know: {e!r}") from None
    if changes.get('block_size', 0) > trained.block_size:
        raise ValueError(f"block_size={changes['block_size']} is longer than the {trained.block_size} that {path} was "
                         "trained with: choose at most that")
    model = build(dataclasses.replace(trained, **changes)).to(device)
    weights, expected = checkpoint['model'], model.state_dict()
    for name, p in expected.items():
        shape = (trained.block_size, p.size(1)) if name.endswith('.positions.weight') else tuple(p.shape)
        found = weights.get(name)
        if not isinstance(found, torch.Tensor) or tuple(found.shape) != shape:
            raise ValueError(f"{path} does not fit its own configuration: {name} should be a tensor of shape {shape}, and "
                             f"is {tuple(found.shape) if isinstance(found, torch.Tensor) else 'missing'}")
        weights[name] = found[:len(p)]  # a shorter block_size forgets the far positions
    if unknown := [name for name in weights if name not in expected]:
        raise ValueError(f"{path} does not fit its own configuration: {unknown[0]!r} is not part of the model")
    model.load_state_dict(weights)
    return model, checkpoint


def read_checkpoint(path, device='cpu'):
    """Open a file that `save` wrote, without running any code from it. Raises as `load` does."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no checkpoint {path}: train a model first, with python train.py")
    with open(path, 'rb') as f, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            checkpoint = torch.load(f, map_location=device, weights_only=True)
        except Exception as e:  # damaged bytes can make the reader fail in any way
            raise ValueError(f"{path} is not a whole checkpoint ({type(e).__name__}): choose another one") from None
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get('config'), dict)
            and isinstance(checkpoint.get('model'), dict)):
        raise ValueError(f"{path} is not a checkpoint of this project: it has no 'config' and 'model'")
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
