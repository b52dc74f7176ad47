"""
The Transformer family in one file, to be read from top to bottom.

    Config, PRESETS        what can be chosen, and what each model of history chose
    sinusoids, rotate      how a model knows the order of its tokens
    attention_mask         which keys each query may see: causal, padding, windows
    attention, Attention   softmax(Q K^T / sqrt(D)) V, and the multi-head layer around it
    KVCache                keys and values of earlier tokens, which decoding need not read again
    MLP, Block             the feed-forward layer; attention and MLP joined by residuals and norms
    Embedding, Stack       ids -> vectors -> n_layer blocks
    GPT, LSTM, BERT, EncoderDecoder, TaskModel      ids -> (logits, loss)
    build, save, load
    FAMILIES               the names that Hugging Face uses for all of this, to load and to export

Letters in the comments on shapes:

    B batch   T query positions    S key positions    C channels (n_embd)    D channels a head, d_k
    H heads   G key/value heads    V vocabulary       L labels               N tokens with a target

Papers that are cited by number:

    [1] Vaswani et al. 2017, Attention Is All You Need, https://arxiv.org/abs/1706.03762
    [2] Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2)
    [3] Devlin et al. 2018, BERT, https://arxiv.org/abs/1810.04805
    [4] Raffel et al. 2019, T5, https://arxiv.org/abs/1910.10683
    [5] Chowdhery et al. 2022, PaLM, https://arxiv.org/abs/2204.02311
    [6] Su et al. 2021, RoFormer (rotary positions), https://arxiv.org/abs/2104.09864
"""

import contextlib
import json
import math
import os
import re
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

IGNORE_INDEX = -100  # as a target: nothing is predicted here, and it does not count in the loss

# -----------------------------------------------------------------------------
# Configuration. It is saved in every checkpoint, so a model can be rebuilt from its file alone.

def require(holds, message):
    """Raise ValueError with the message unless `holds` is true."""
    if not holds:
        raise ValueError(message)

def flag(default, help, choices=(), low=0, high=2 ** 31):
    """A field that describes itself: train.py makes a flag of it, and --help prints its text."""
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))

TASKS = ('classify', 'tag', 'qa')  # what TaskModel knows; to add one, see Task in prepare_data.py

@dataclass
class Config:
    """
    The architecture of a model. Raises ValueError if it cannot be built. Whatever you add to the
    computation must be a field here, so that an export can refuse what transformers cannot express.
    """
    arch: str = flag('gpt', 'kind of model', ('gpt', 'bert', 'encdec', 'lstm'))
    task: str = flag('', f"task of the head: {', '.join(TASKS)} or yours; the data says which")
    n_labels: int = flag(0, 'labels of the task, L; the data says how many')
    # sizes: small enough by default to train in minutes on a laptop
    vocab_size: int = flag(50257, 'number of different tokens, V; the data says', low=1)
    block_size: int = flag(128, 'longest sequence, in tokens', low=1)
    n_layer: int = flag(4, 'blocks in a stack', low=1, high=10_000)
    n_head: int = flag(4, 'attention heads, H', low=1)
    n_kv_head: int = flag(0, 'key/value heads, G; 0: as many as n_head')
    n_embd: int = flag(128, 'channels, C', low=1)
    head_dim: int = flag(0, 'channels per head, D; 0: n_embd / n_head')
    mlp_dim: int = flag(0, 'width inside the MLP; 0: 4 * n_embd')
    # blocks
    norm: str = flag('layernorm', 'normalisation of a vector', ('layernorm', 'rmsnorm'))
    norm_eps: float = flag(1e-5, 'added under the square root in a norm', low=1e-20, high=1)
    norm_weight: bool = flag(True, 'norms scale each channel by a learned weight')
    norm_first: bool = flag(True, 'True: x + f(norm(x)); False: norm(x + f(x)), as in 2017')
    qk_norm: bool = flag(False, 'normalise queries and keys, which bounds the attention scores')
    parallel: bool = flag(False, 'attention and MLP side by side, not one after the other')
    activation: str = flag('gelu_tanh', 'activation of the MLP; swiglu and geglu have a gate',
                           ('gelu_tanh', 'gelu', 'relu', 'relu2', 'swiglu', 'geglu'))
    scale_attention: bool = flag(True, 'divide scores by sqrt(D); T5 does not')
    bias: bool = flag(True, 'biases in the linear layers of blocks and in LayerNorm')
    # positions and windows
    positions: str = flag('learned', 'how a model knows the order of tokens',
                          ('learned', 'sinusoids', 'rotary', 'relative', 'none'))
    rope_theta: float = flag(10000.0, 'rotary: base of the frequencies theta^(-2i/D)', low=1)
    rope_scaling: str = flag('', 'rotary, for longer texts: llama3 FACTOR LOW HIGH LENGTH')
    window: str = flag('0', 'how far a token sees, counting itself; 0: without limit; "4 4 4 0": '
                            'a value for each block, repeated')
    buckets: int = flag(32, 'relative: groups of distances, each with a learned bias', low=4)
    max_distance: int = flag(128, 'relative: distances from here on share one bias', low=1)
    # input and output
    segments: int = flag(0, 'segment embeddings: BERT has 2, for sentences A and B')
    embedding_norm: bool = flag(False, 'normalise the input of the first block')
    scale_embedding: bool = flag(False, 'multiply token embeddings by sqrt(C)')
    scale_output: bool = flag(False, 'multiply the input of the output layer by 1/sqrt(C)')
    tied: bool = flag(True, 'the output layer uses the token embeddings as weights')
    # training
    init: str = flag('gpt2', 'see init_weights', ('gpt2', 'normal', 'fan_in', 'zero'))
    dropout: float = flag(0.0, 'probability of zeroing a value in training', high=0.99)
    label_smoothing: float = flag(0.0, 'share of a target spread over all classes', high=0.99)
    may_change = ('block_size', 'dropout', 'label_smoothing')  # in a trained model; itself no field

    def __post_init__(self):
        for f in fields(self):
            value, rules, kind = getattr(self, f.name), f.metadata, f.type
            if kind is float and type(value) is int:
                value = float(value)
            require(type(value) is kind, f"{f.name}={value!r} must be of type {kind.__name__}")
            require(not rules['choices'] or value in rules['choices'],
                    f"{f.name}={value} is unknown: choose one of {rules['choices']}")
            require(kind is str or rules['low'] <= value <= rules['high'],
                    f"{f.name}={value} must be between {rules['low']} and {rules['high']}")
            setattr(self, f.name, value)
        require(self.arch == 'lstm' or self.head_dim or self.n_embd % self.n_head == 0,
                f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        require(self.n_head % self.kv_heads == 0,
                f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        channels = {'rotary': self.head_size, 'sinusoids': self.n_embd}.get(self.positions, 0)
        require(channels % 2 == 0, f"{self.positions} positions need even channels, not {channels}")
        require(self.positions != 'relative' or self.buckets < 2 * self.max_distance,
                f"buckets={self.buckets} must be less than twice max_distance={self.max_distance}")
        require(re.fullmatch(r'\d{1,9}( \d{1,9})*', self.window),
                f"window={self.window} must be a whole number, or several with spaces between them")
        rope = re.fullmatch('llama3' + r' ([1-9]\d*(?:\.\d+)?)' * 4, self.rope_scaling)
        require(not self.rope_scaling or (rope and float(rope[2]) < float(rope[3])),
                f"rope_scaling={self.rope_scaling} must be llama3 FACTOR LOW HIGH LENGTH, each at "
                "least 1 and LOW below HIGH")
        require(self.arch == 'bert' or not self.segments,
                f"segments={self.segments}: only arch=bert reads segments")
        require(self.n_labels or self.task not in ('classify', 'tag'),
                f"task={self.task} needs n_labels, which only labelled data gives")
        require(self.arch != 'encdec' or not self.task,
                f"task={self.task}: an encoder-decoder has no head: choose another arch")
        require(not self.label_smoothing or (self.arch != 'bert' and not self.task),
                f"label_smoothing={self.label_smoothing} is only for models that write text")

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def head_size(self):
        return self.head_dim or self.n_embd // self.n_head

# Each row is a model of history, in a size for a laptop. The published sizes are below.
PRESETS = {
    'transformer': Config(arch='encdec', norm_first=False, positions='sinusoids', activation='relu',
                          scale_embedding=True, init='fan_in', dropout=0.1, label_smoothing=0.1),
    'bert': Config(arch='bert', block_size=64, norm_first=False, norm_eps=1e-12, segments=2,
                   embedding_norm=True, activation='gelu', init='normal'),
    'gpt2': Config(),
    't5': Config(arch='encdec', norm='rmsnorm', norm_eps=1e-6, positions='relative', head_dim=32,
                 activation='relu', bias=False, scale_attention=False, scale_output=True,
                 init='fan_in'),
    'palm': Config(parallel=True, positions='rotary', activation='swiglu', n_kv_head=1, bias=False,
                   scale_output=True, init='fan_in'),
    'llama': Config(norm='rmsnorm', norm_eps=1e-6, positions='rotary', activation='swiglu',
                    mlp_dim=344, n_kv_head=2, bias=False, tied=False, init='normal'),  # G=2: GQA
    # no model of history: what learns fastest on a laptop (tests/bench/README.md)
    'nano': Config(norm_weight=False, qk_norm=True, bias=False, positions='rotary',
                   window='2 4 8 0', activation='swiglu', mlp_dim=256, tied=False, init='zero'),
    'lstm': Config(arch='lstm', positions='none', n_layer=2, n_embd=256, tied=False, init='fan_in'),
}
PRESETS |= {  # the published sizes, on top of their row
    'transformer-base': replace(PRESETS['transformer'], vocab_size=37000, block_size=512,
                                n_layer=6, n_head=8, n_embd=512),
    't5-small': replace(PRESETS['t5'], vocab_size=32128, block_size=512, n_layer=6, n_head=8,
                        n_embd=512, head_dim=64),
    'bert-base': replace(PRESETS['bert'], vocab_size=30522, block_size=512, n_layer=12, n_head=12,
                         n_embd=768),
    'gpt2-124m': replace(PRESETS['gpt2'], block_size=1024, n_layer=12, n_head=12, n_embd=768),
    'palm-8b': replace(PRESETS['palm'], vocab_size=256000, block_size=2048, n_layer=32, n_head=16,
                       n_embd=4096, head_dim=256, mlp_dim=16384),
    'llama-7b': replace(PRESETS['llama'], vocab_size=32000, block_size=2048, n_layer=32, n_head=32,
                        n_kv_head=0, n_embd=4096, mlp_dim=11008),
}

# -----------------------------------------------------------------------------
# Positional encoding. Attention is a sum over the keys, which is the same in any order.

def sinusoids(length, channels):
    """
    PE(pos, 2i) = sin(pos / 10000^(2i/C)), PE(pos, 2i+1) = cos(the same): section 3.5 of [1].
    They are fixed, not learned. The wavelengths grow from 2 pi to 10000 * 2 pi. Returns (T, C).
    """
    frequency = 10000.0 ** (-torch.arange(0, channels, 2).float() / channels)  # (C/2,)
    angle = torch.arange(length)[:, None] * frequency                      # (T, C/2)
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)

def rotary_angles(length, channels, theta, scaling=''):
    """
    The angle of each pair of channels at each position, in radians (T, D/2): section 3.2 of [6].
    `llama3 FACTOR LOW HIGH LENGTH` is for texts longer than the LENGTH that a model was trained on:
    a pair that makes fewer than LOW turns in LENGTH positions turns FACTOR times slower, one with
    more than HIGH is unchanged, one between is a mixture of both (from the code of Llama 3.1).
    """
    frequency = theta ** (-torch.arange(0, channels, 2).float() / channels)  # (D/2,)
    if scaling:
        factor, low, high, trained = map(float, scaling.split()[1:])
        turns = trained * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)                  # share that stays
        frequency = kept * frequency + (1 - kept) * frequency / factor
    return torch.arange(length)[:, None] * frequency

def rotate(x, cos, sin):
    """
    Rotate each pair of channels (a, b) of x (B, H, T, D) by the angle of its position, to
    (a cos - b sin, b cos + a sin): section 3.4.2 of [6]. cos and sin (T, D/2). The dot product of a
    rotated query and key depends on positions only through the distance between them. The channels
    of a pair lie D/2 apart, as in Hugging Face's code; the paper and Meta's LLaMA pair neighbours.
    """
    cos, sin = cos.type_as(x), sin.type_as(x)
    a, b = x.chunk(2, dim=-1)                                              # (B, H, T, D/2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

def distance_buckets(distance, both_sides, buckets=32, max_distance=128):
    """
    T5's relative positions: distance (T, S) = key position - query position -> bucket (T, S),
    section 2.1 of [4]. Half of the buckets hold one distance each, the other half growing ranges up
    to max_distance, and the last bucket all beyond, too. both_sides=True (an encoder) gives half of
    all buckets to keys on the right; in a decoder, keys on the right count as distance 0.
    """
    first = 0  # the first bucket of the key's side
    if both_sides:
        buckets //= 2
        first, distance = (distance > 0) * buckets, distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    near = buckets // 2
    log_ratio = torch.log(distance.clamp(min=1).float() / near) / math.log(max_distance / near)
    far = near + (log_ratio * (buckets - near)).long()
    return first + torch.where(distance < near, distance, far.clamp(max=buckets - 1))

# -----------------------------------------------------------------------------
# Attention

def attention_mask(positions, key_positions, causal, window=0, real=None):
    """
    Which keys each query may see: bool (1 or B, 1, T, S), True = may see, as in
    F.scaled_dot_product_attention (nn.MultiheadAttention means the opposite). positions (T,) are
    those of the queries, key_positions (S,) those of the keys. causal: a query sees keys up to its
    own position. window: a query sees keys less than so many positions away (Beltagy et al. 2020,
    Longformer, https://arxiv.org/abs/2004.05150); 0: all. real (B, S): False at padding.

    With a cache of three tokens and two new ones, causal=True, window=3:

    >>> attention_mask(torch.arange(3, 5), torch.arange(5), True, window=3)[0, 0].int().tolist()
    [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]

    A rule of your own must be a new argument, passed to Stack.forward as one of `others` (if it is
    a field of Config, add it to `others` inside of Stack.forward): without one,
    Stack.mask_arguments often makes no mask, since a kernel knows the causal rule itself. In a CUDA
    graph (see KVCache) S is the size of the cache, so the shapes of q and k do not say where a
    query stands: derive distances from positions and key_positions.
    """
    distance = key_positions - positions[None, :, None]                    # (1, T, S), past: < 0
    mask = distance <= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        mask = mask & (distance.abs() < window)
    if real is not None:
        real = real.bool()                                                 # it may hold 1 and 0
        mask = mask & real[:, None, :]                                     # (B, T, S)
        # If a query sees no key, softmax is 0 / 0: NaN, which would reach every gradient. Such a
        # query is padding, as is its whole window. Its output is not used, so let it see all keys.
        mask = mask | ~mask.any(dim=-1, keepdim=True)
    return mask[:, None]

def repeat_heads(t, n):
    """
    t (B, G, S, D) -> (B, n, S, D): each of G key/value heads serves n / G query heads (GQA, Ainslie
    et al. 2023, arxiv.org/abs/2305.13245; G=1: multi-query).
    """
    return t if t.size(1) == n else t.repeat_interleave(n // t.size(1), dim=1)

def attention_weights(q, k, mask=None, causal=False, scale=None):
    """
    softmax(Q K^T / sqrt(D)), equation 1 of [1]: how much of each key's value a query receives.
    q (B, H, T, D), k (B, G, S, D) -> (B, H, T, S), rows that sum to 1. mask is bool, as made by
    attention_mask, or float, added to the scores. causal=True: query i sees the keys up to i.
    scale: 1/sqrt(D) unless given. If you change the formula, add an argument for it: without one,
    attention() mostly calls a fused kernel instead, which computes the old formula.

    By hand, for four one-hot vectors x_1..x_4: the score x_i . x_j / sqrt(4) is 1/2 where i = j
    and 0 elsewhere, so a token gives itself exp(1/2) / (exp(1/2) + 3) = 0.35 and each other token
    exp(0) / (exp(1/2) + 3) = 0.22 (with V = X these are also the outputs):

    >>> x = torch.eye(4)[None, None]
    >>> [round(weight, 2) for weight in attention_weights(x, x)[0, 0, 0].tolist()]
    [0.35, 0.22, 0.22, 0.22]
    >>> [round(weight, 2) for weight in attention_weights(x, x, causal=True)[0, 0, 1].tolist()]
    [0.38, 0.62, 0.0, 0.0]
    """
    scale = scale or q.size(-1) ** -0.5                                    # 1/sqrt(d_k)
    k = repeat_heads(k, q.size(1))                                         # (B, H, S, D)
    scores = (q * scale) @ k.transpose(-2, -1)                             # (B, H, T, S)
    if causal:
        scores = scores + scores.new_full(scores.shape[2:], -math.inf).triu(1)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -math.inf)
        scores = scores + mask.to(scores.dtype)
    return scores.softmax(dim=-1)

class Dropout(nn.Dropout):
    """
    Zero each value with probability p in training, and scale the others up so that the mean stays
    (Srivastava et al. 2014). On a CPU one random byte decides on each value, and eight bytes are
    drawn as one int64: faster than F.dropout, but p is rounded to a multiple of 1/256.
    """

    def forward(self, x):
        if not self.training or not self.p:
            return x
        if not x.is_cpu:
            return F.dropout(x, self.p)
        zeroed = min(255, max(1, round(256 * self.p)))                     # of 256 bytes
        draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-2 ** 63, None)
        kept = draws.view(torch.uint8)[:x.numel()].view(x.shape) >= zeroed
        return x * kept.to(x.dtype) * (256 / (256 - zeroed))

def formula_is_better(q, k, mask, p):
    """
    Whether the formula serves attention() better than the fused kernel. Measured on a CPU with 256
    positions: in bfloat16 the backward pass of the fused kernel made a training step 1.3 times
    slower than the formula did; with dropout p it is slower still. Long sequences need the kernel
    anyway: the formula stores all T x S weights. On mps the kernel is wrong for tensors that are
    not contiguous (pytorch#181133 on GitHub); on CUDA its backward pass may crash where only the
    mask has a gradient (pytorch#148476), as in a T5 that is partly frozen.
    """
    trains_on_cpu = q.is_cpu and torch.is_grad_enabled()
    faster = trains_on_cpu and k.size(2) <= 512 and (q.dtype == torch.bfloat16 or p > 0)
    return faster or q.is_mps or (mask is not None and mask.requires_grad and not q.requires_grad)

def attention(q, k, v, drop, mask=None, causal=False, scale=None, recorded=None, **others):
    """
    attention_weights(q, k) @ v, by a fused kernel, or by the formula where that is better. Both
    agree up to rounding. q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D). drop: the Dropout of
    the weights. recorded: a list to which they are added. others: arguments that you added to
    attention_weights. With either, the formula is used.
    """
    p = drop.p if drop.training else 0.0
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))          # (B, H, S, D)
    if others or recorded is not None or formula_is_better(q, k, mask, p):
        weights = attention_weights(q, k, mask, causal, scale, **others)
        if recorded is not None:
            recorded.append(weights)
        return drop(weights) @ v
    return F.scaled_dot_product_attention(q, k, v, mask, p, causal, scale=scale)

def make_norm(config, channels, wanted=True):
    """
    LayerNorm: (x - mean) / sqrt(var + eps) * w + b (Ba et al. 2016, arxiv.org/abs/1607.06450).
    RMSNorm: x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich 2019, arxiv.org/abs/1910.07467).
    Both average over the channels of one position. wanted=False: the identity.
    """
    if not wanted:
        return nn.Identity()
    if config.norm == 'layernorm':
        return nn.LayerNorm(channels, config.norm_eps, config.norm_weight, config.bias)
    return nn.RMSNorm(channels, config.norm_eps, config.norm_weight)

class KVCache:
    """
    What a decoder remembers of the tokens it has read, so that each step reads only the new one.

        length          tokens read so far, the position of the next one; it stays 0 in `cross`
        positions       of the tokens that are being read, (T,)
        layers[i]       keys and values of block i, (2, B, G, size, D), filled up to length
        memory, memory_mask     the encoded source (B, S, C) and its attention_mask (B, S)
        cross           the KVCache of the source, which the first step of decoding fills
        state           of an LSTM, which has no keys: (h, c), each (n_layer, B, C)

    A cache has room for `size` tokens. On a CPU keys and values are float32 whatever the
    dtype of the model: one query then attends to many keys 5 times as fast as in bfloat16.

    A CUDA graph (`capture` in sample.py) repeats operations of fixed shapes at fixed places in
    memory. Inside one, `length` is a tensor on the device, and queries read all `size` keys; a mask
    hides those that are not filled yet.
    """

    def __init__(self, size, memory=None, memory_mask=None):
        self.size, self.length, self.layers = size, 0, {}
        self.positions = self.state = None
        self.memory, self.memory_mask = memory, memory_mask
        self.cross = None if memory is None else KVCache(memory.size(1))

    def append(self, layer, k, v):
        """Add k, v (B, G, T, D); returns all, (2, B, G, S, D). Stack.forward moves `length`."""
        new = torch.stack([k, v])                                          # (2, B, G, T, D)
        if layer not in self.layers:
            self.layers[layer] = new.new_zeros((*new.shape[:3], self.size, new.size(4)),
                                               dtype=torch.float32 if k.is_cpu else new.dtype)
        both = self.layers[layer]                                          # (2, B, G, size, D)
        if isinstance(self.length, torch.Tensor):
            return both.index_copy_(3, self.positions, new.type_as(both))
        end = self.length + k.size(2)
        if end > self.size:  # require(f'...') would make torch.compile recompile at each length
            raise ValueError(f"{end} tokens are more than the {self.size} of this KVCache")
        both[..., self.length:end, :] = new
        return both[..., :end, :]                                          # (2, B, G, S, D)

    def clear(self):
        """Forget all tokens that were read, but not the source."""
        self.length = 0
        self.state = None

    def reorder(self, rows, source=True):
        """
        Row i becomes what row rows[i] was. source=False leaves the source as it is: enough where
        rows only change places among the beams of one source.
        """
        self.layers = {i: both[:, rows] for i, both in self.layers.items()}
        if self.state is not None:
            self.state = tuple(s[:, rows] for s in self.state)
        if source and self.memory is not None:
            self.cross.reorder(rows)
            self.memory = self.memory[rows]
            self.memory_mask = None if self.memory_mask is None else self.memory_mask[rows]

def narrow(x):
    """Convert x to 16 bits if autocast is on: once here, not in each product that reads x."""
    device = 'cpu' if x.is_cpu else 'cuda'  # torch raises at the name of another, such as meta
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

class Attention(nn.Module):
    """
    Multi-head attention, section 3.2.2 of [1]: H heads, each with D channels of its own, whose
    outputs stand side by side and are projected back to C channels. Keys and values come from x
    itself, or in cross-attention from `memory`, the encoded source. layer: the index under which a
    KVCache keeps them, so that two blocks cannot share one Attention.
    """

    def __init__(self, config, layer):
        super().__init__()
        C, D, H, G = config.n_embd, config.head_size, config.n_head, config.kv_heads
        self.q, self.k, self.v = (nn.Linear(C, n * D, config.bias) for n in (H, G, G))
        self.proj = nn.Linear(H * D, C, config.bias)
        self.q_norm = make_norm(config, D, config.qk_norm)
        self.k_norm = make_norm(config, D, config.qk_norm)
        self.drop, self.layer = Dropout(config.dropout), layer
        self.config = config
        self.recorded = None  # set to a list, it collects the weights (B, H, T, S) of each call

    def project(self, x, source):
        """All heads: q (B, T, H D), k, v (B, S, G D). join_projections of sample.py joins them."""
        return self.q(x), self.k(source), self.v(source)

    def split_heads(self, t):
        return t.unflatten(-1, (-1, self.config.head_size)).transpose(1, 2)  # (B, H, T, D)

    def forward(self, x, memory=None, newest=0, rotary=None, cache=None, **scoring):
        """
        x (B, T, C) -> (B, T, C). rotary: (cos, sin) of the positions of x. With a cache, x holds
        only the new tokens, which see the last `newest` of all keys (0: all). With a memory, the
        first call fills the cache, later ones read it. scoring: mask, ... as in attention_weights.
        """
        x = narrow(x)
        if memory is not None and cache is not None and self.layer in cache.layers:
            q = self.q_norm(self.split_heads(self.q(x)))                   # (B, H, T, D)
            k, v = cache.layers[self.layer]                                # of a source read before
        else:
            parts = self.project(x, x if memory is None else memory)
            q, k, v = map(self.split_heads, parts)                         # k, v (B, G, S, D)
            q, k = self.q_norm(q), self.k_norm(k)
            if rotary is not None:
                q, k = rotate(q, *rotary), rotate(k, *rotary)
            if cache is not None:
                k, v = cache.append(self.layer, k, v)[..., -newest:, :]    # newest=0: all
        dtype, q = q.dtype, q.type_as(k)                                   # a cache may be float32
        scoring['scale'] = None if self.config.scale_attention else 1.0
        if self.recorded is not None:
            scoring['recorded'] = self.recorded
        y = attention(q, k, v, self.drop, **scoring).to(dtype)             # (B, H, T, D)
        return self.proj(y.transpose(1, 2).flatten(2))                     # heads side by side

# -----------------------------------------------------------------------------
# Blocks

ACTIVATIONS = {
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),  # GPT-2 was trained with it
    'gelu': F.gelu,  # x P(N(0, 1) < x): Hendrycks and Gimpel 2016, arxiv.org/abs/1606.08415
    'relu': F.relu,
    'relu2': lambda x: F.relu(x).square(),  # So et al. 2021, Primer, arxiv.org/abs/2109.08668
    'swiglu': F.silu,  # x sigmoid(x)
    'geglu': lambda x: F.gelu(x, approximate='tanh'),
}
GATED = ('swiglu', 'geglu')  # Shazeer 2020, arxiv.org/abs/2002.05202

class MLP(nn.Module):
    """
    max(0, x W_1 + b_1) W_2 + b_2, section 3.3 of [1]: at each position alone, expand, apply the
    activation, project back. With a gate: (activation(x W_g) * x W_1) W_2.
    """

    def __init__(self, config):
        super().__init__()
        C, inner = config.n_embd, config.mlp_dim or 4 * config.n_embd
        self.activation = config.activation
        self.fc = nn.Linear(C, inner, config.bias)
        self.gate = nn.Linear(C, inner, config.bias) if config.activation in GATED else None
        self.proj = nn.Linear(inner, C, config.bias)

    def forward(self, x):
        x = narrow(x)
        h, activation = self.fc(x), ACTIVATIONS[self.activation]           # (B, T, inner)
        h = activation(h) if self.gate is None else activation(self.gate(x)) * h
        return self.proj(h)                                                # (B, T, C)

class Block(nn.Module):
    """
    Self-attention, cross-attention where there is a source, MLP. Each adds its result to the
    residual stream x. Pre-norm (GPT-2 and later) normalises the input of each sublayer, post-norm
    (2017, BERT) the stream itself. parallel (PaLM, section 2 of [5]): attention and MLP read the
    same normalised stream and are added at once.
    """

    def __init__(self, config, layer, cross=False):
        super().__init__()
        C, self.norm_first, self.parallel = config.n_embd, config.norm_first, config.parallel
        self.attn = Attention(config, layer)
        self.cross = Attention(config, layer) if cross else None
        self.mlp = MLP(config)
        self.attn_norm = make_norm(config, C)
        self.cross_norm = make_norm(config, C) if cross else None
        self.mlp_norm = None if self.parallel else make_norm(config, C)
        self.drop = Dropout(config.dropout)

    def residual(self, x, norm, sublayer):
        if self.norm_first:
            return x + self.drop(sublayer(norm(x)))
        return norm(x + self.drop(sublayer(x)))

    def forward(self, x, self_attention, cross_attention):
        """x (B, T, C) -> (B, T, C). The two dicts are the keyword arguments of the attentions."""
        attn = lambda h: self.attn(h, **self_attention)
        cross = lambda h: self.cross(h, **cross_attention)
        both = lambda h: attn(h) + self.mlp(h)
        x = self.residual(x, self.attn_norm, both if self.parallel else attn)
        if self.cross is not None:
            x = self.residual(x, self.cross_norm, cross)
        return x if self.parallel else self.residual(x, self.mlp_norm, self.mlp)

# -----------------------------------------------------------------------------
# Stacks

class Embedding(nn.Module):
    """Token + position (+ segment) embeddings, the input of a stack. tokens: the model's table."""

    def __init__(self, config, tokens):
        super().__init__()
        self.tokens = tokens                                               # nn.Embedding (V, C)
        self.kind, C = config.positions, config.n_embd
        self.scale = C ** 0.5 if config.scale_embedding else 1.0           # section 3.4 of [1]
        if self.kind == 'learned':
            self.positions = nn.Embedding(config.block_size, C)
        elif self.kind == 'sinusoids':
            self.register_buffer('sinusoids', sinusoids(config.block_size, C), persistent=False)
        self.segments = nn.Embedding(config.segments, C) if config.segments else None
        self.norm = make_norm(config, C, config.embedding_norm)
        self.drop = Dropout(config.dropout)

    def forward(self, ids, positions, segments=None):
        """ids and segments (B, T), positions (T,) -> (B, T, C). No segments: all are 0."""
        x = self.tokens(ids) * self.scale                                  # (B, T, C)
        if self.kind == 'learned':
            x = x + self.positions(positions)
        elif self.kind == 'sinusoids':
            x = x + self.sinusoids[positions].type_as(x)
        if self.segments is not None:
            last = self.segments.num_embeddings - 1  # with one segment, both texts are 0
            segments = torch.zeros_like(ids) if segments is None else segments.clamp(max=last)
            x = x + self.segments(segments)
        return self.drop(self.norm(x))

class Stack(nn.Module):
    """
    An embedding and n_layer blocks: a decoder (causal=True), where a token sees itself and the
    past, or an encoder, where it sees all others. cross=True: each block also attends to `memory`,
    the output of an encoder.
    """

    def __init__(self, config, tokens, causal, cross=False):
        super().__init__()
        self.causal, self.config = causal, config
        self.windows = [int(n) for n in config.window.split()] * config.n_layer  # repeated
        self.embed = Embedding(config, tokens)
        self.blocks = nn.ModuleList(Block(config, i, cross) for i in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd, config.norm_first)  # post-norm needs none here
        if config.positions == 'rotary':
            angles = rotary_angles(config.block_size, config.head_size, config.rope_theta,
                                   config.rope_scaling)                    # (block_size, D/2)
            self.register_buffer('rotary', torch.stack([angles.cos(), angles.sin()]),
                                 persistent=False)
        elif config.positions == 'relative':
            self.relative_bias = nn.Embedding(config.buckets, config.n_head)  # for all blocks

    def forward(self, ids, attention_mask=None, segments=None, memory=None, memory_mask=None,
                cache=None, **others):
        """
        ids (B, T) -> hidden states (B, T, C). attention_mask (B, T) and memory_mask (B, S) are
        False at padding, which stands on the right; None: all tokens are real. With a cache, ids
        holds only the new tokens, attention_mask also covers the earlier ones, and the memory is
        that of the cache. others: arguments that you have added to the function attention_mask.
        Raises ValueError for more tokens than block_size or the cache allow, or for missing memory.
        """
        past = 0
        if cache is not None:
            past, memory, memory_mask = cache.length, cache.memory, cache.memory_mask
        require(memory is not None or self.blocks[0].cross is None,
                "a decoder with cross-attention needs memory: what encoder or encode() return")
        fixed = isinstance(past, torch.Tensor)                             # in a CUDA graph
        end = cache.size if fixed else past + ids.size(1)
        if end > self.config.block_size:  # not require(f'...'): see KVCache.append
            raise ValueError(f"a sequence of {end} tokens is longer than block_size="
                             f"{self.config.block_size}: shorten it, or train with a larger one")
        key_positions = torch.arange(end, device=ids.device)               # (S,)
        positions = past + key_positions[:ids.size(1)]                     # (T,), after the cached
        x = self.embed(ids, positions, segments)                           # (B, T, C)
        # The arguments of the attentions, which are equal in all blocks but for their windows
        own, cross = {'cache': cache}, {'cache': cache and cache.cross, 'memory': memory}
        if cache is not None:
            cache.positions = positions
        if self.config.positions == 'rotary':
            own['rotary'] = self.rotary[:, positions].unbind()             # 2 x (T, D/2)
        masks = {window: self.mask_arguments(positions, key_positions, window, attention_mask,
                                             fixed, **others)
                 for window in {*self.windows}}
        if memory_mask is not None:
            real = memory_mask[:, None, None].bool()                       # (B, 1, 1, S)
            cross['mask'] = real | ~real.any(dim=-1, keepdim=True)         # nothing real: see all
            cross['mask'] = self.as_numbers(cross['mask'])
        for block, window in zip(self.blocks, self.windows):
            x = block(x, own | masks[window], cross)
        if cache is not None:
            cache.length += ids.size(1)
        return self.norm(x)

    def mask_arguments(self, positions, key_positions, window, real, fixed, **others):
        """
        Which keys are seen, as arguments of Attention.forward. real: Stack's attention_mask. For a
        bias of your own, `relative` must be true.
        """
        T, S = positions.size(0), key_positions.size(0)
        relative = self.config.positions == 'relative'
        # Kernels are faster without a mask. A single new token needs no mask: it sees the newest
        # keys. T queries on T keys need none where the window hides no key: causal=True is enough.
        # Several new tokens after cached ones need one: causal=True aligns query 0 with key 0.
        if real is None and not (relative or fixed or others):
            if T == 1:
                return {'newest': window}
            if not 0 < window < S and (not self.causal or T == S):
                return {'causal': self.causal}
        mask = attention_mask(positions, key_positions, self.causal, window, real, **others)
        bias = 0.0
        if relative:
            distance = key_positions - positions[:, None]                  # (T, S)
            buckets = distance_buckets(distance, not self.causal, self.config.buckets,
                                       self.config.max_distance)
            bias = self.relative_bias(buckets).permute(2, 0, 1).contiguous()  # (H, T, S)
        return {'mask': self.as_numbers(mask, bias)}                       # (1 or B, 1 or H, T, S)

    def as_numbers(self, mask, bias=0.0):
        """What to add to scores: bias where mask is True, else -inf."""
        return torch.where(mask, bias, -math.inf).to(self.embed.tokens.weight.dtype)

# -----------------------------------------------------------------------------
# Models. Each maps a batch, given as keyword arguments, to (logits, loss).

def cross_entropy(logits, targets, num_targets=None, smoothing=0.0):
    """
    The one loss of this project, in nats: whatever is predicted is a choice among classes. logits
    (..., classes), targets (...), where IGNORE_INDEX means that nothing is predicted. The loss is
    the sum over all targets, divided by num_targets: their number here, unless the caller gives
    that of the whole global batch (a mean of means would give short rows more weight). A term that
    you add must be divided by num_targets, too. smoothing: the share of the probability that is
    spread over all classes (Szegedy et al. 2015, https://arxiv.org/abs/1512.00567).
    """
    if targets is None:
        return None
    loss = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction='sum',
                           ignore_index=IGNORE_INDEX, label_smoothing=smoothing)
    if num_targets is None:
        num_targets = (targets != IGNORE_INDEX).sum().clamp(min=1)
    return loss / num_targets

def init_weights(model):
    """
    Biases start at 0; norms stay at 1; what is called neither weight nor bias stays as it is.
    Matrices called weight are normal draws, of mean 0 and standard deviation

    gpt2     0.02; / sqrt(2 n_layer) where a layer writes to the residual stream: section 2.3 of [2]
    normal   0.02 everywhere (BERT; LLaMA as in Hugging Face's code)
    fan_in   1 / sqrt(columns); token embeddings 1 if not scale_embedding: section 5 of [5]
    zero     fan_in, but 0 where a layer writes to the stream or (untied) the logits: at first,
             blocks add nothing (a factor of your own there must not be 0, too: nothing would learn)
    """
    config = model.config
    for name, p in model.named_parameters():
        writes = name.endswith('proj.weight')  # to the residual stream
        if p.ndim != 2 or 'weight' not in name:
            if '.bias' in name:
                nn.init.zeros_(p)
            continue
        if config.init == 'zero' and (writes or name.startswith('output.')):
            std = 0.0
        elif config.init in ('gpt2', 'normal'):
            std = 0.02 / math.sqrt(2 * config.n_layer) if config.init == 'gpt2' and writes else 0.02
        elif name.startswith('tokens.') and not config.scale_embedding:
            std = 1.0
        else:
            std = p.size(1) ** -0.5
        if name.endswith('.q.weight') and not config.scale_attention:
            std *= config.head_size ** -0.5  # in place of the scores' 1/sqrt(D)
        nn.init.normal_(p, std=std)

class Output(nn.Module):
    """Hidden states -> logits h W^T + b. W: the token embeddings (tied), or a matrix of its own."""

    def __init__(self, config, tokens, bias=False):
        super().__init__()
        W = tokens.weight                                                  # (V, C)
        self.weight = W if config.tied else nn.Parameter(torch.empty_like(W))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if bias else None
        self.scale = config.n_embd ** -0.5 if config.scale_output else 1.0

    def forward(self, x):
        return F.linear(x * self.scale, self.weight, self.bias)            # (..., C) -> (..., V)

class LanguageModel(nn.Module):
    """A model that predicts tokens. A subclass sets `output`, and `decoder` or its own `hidden`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)       # (V, C)

    def hidden(self, ids, **inputs):
        """ids (B, T) -> (B, T, C). The inputs are those of Stack."""
        return self.decoder(ids, **inputs)

    def forward(self, ids, *, attention_mask=None, targets=None, num_targets=None, **inputs):
        """
        ids (B, T) -> logits (B, T, V), and the loss where targets (B, T) are given: targets[b, t]
        is the token after ids[b, t], so they are shifted already. Other inputs go to the stack.
        """
        x = self.hidden(ids, attention_mask=attention_mask, **inputs)      # (B, T, C)
        logits = self.output(x)                                            # (B, T, V)
        smoothing = self.config.label_smoothing if self.training else 0.0
        return logits, cross_entropy(logits, targets, num_targets, smoothing)

    def decode(self, ids, cache=None):
        """The newest tokens (B, T) -> logits of the token after the last one, (B, V)."""
        return self.output(self.hidden(ids, cache=cache)[:, -1])

class GPT(LanguageModel):
    """A decoder-only, autoregressive Transformer [2]: P(x) = product of P(x_t given x_<t)."""

    def __init__(self, config):
        super().__init__(config)
        self.decoder = Stack(config, self.tokens, causal=True)
        self.output = Output(config, self.tokens)
        init_weights(self)

class LSTM(LanguageModel):
    """
    Language models before the Transformer (Hochreiter and Schmidhuber 1997; gate f: Gers et al.
    2000): all of the past has to fit into a state of fixed size. i, f, o are the sigmoid and g the
    tanh of W x_t + U h_(t-1) + b; c_t = f c_(t-1) + i g, h_t = o tanh(c_t). Padding needs no mask.
    """

    def __init__(self, config):
        super().__init__(config)
        C = config.n_embd
        between = config.dropout if config.n_layer > 1 else 0.0            # else torch warns
        self.lstm = nn.LSTM(C, C, config.n_layer, batch_first=True, dropout=between)
        self.drop = Dropout(config.dropout)
        self.output = Output(config, self.tokens)
        init_weights(self)

    def hidden(self, ids, cache=None, **inputs):
        """ids (B, T) -> (B, T, C)."""
        cache = cache or KVCache(0)                                        # only its state is used
        with torch.autocast(ids.device.type, enabled=False):  # cuDNN would take float16, unscaled
            x, cache.state = self.lstm(self.drop(self.tokens(ids)), cache.state)
        cache.length += ids.size(1)
        return self.drop(x)

class BERT(LanguageModel):
    """
    An encoder [3]: every token sees every other. So BERT does not predict the next token, but
    hidden ones (masked language model), and whether text B follows text A (next sentence
    prediction). It reads `[CLS] A [SEP] B [SEP]`; the output at [CLS] stands for the whole.
    """

    def __init__(self, config):
        super().__init__(config)
        C = config.n_embd
        self.encoder = Stack(config, self.tokens, causal=False)
        self.transform = nn.Linear(C, C)
        self.transform_norm = make_norm(config, C)
        self.output = Output(config, self.tokens, bias=True)
        self.pooler = nn.Linear(C, C)
        self.nsp_head = nn.Linear(C, 2)  # class 1: B follows A (0 in Google's files)
        init_weights(self)

    def hidden(self, ids, **inputs):
        """ids (B, T) -> (B, T, C). The inputs are those of Stack."""
        return self.encoder(ids, **inputs)

    def mlm_logits(self, x):
        """Hidden states (..., C) -> logits of the token there (..., V)."""
        activation = ACTIVATIONS[self.config.activation]
        return self.output(self.transform_norm(activation(self.transform(x))))

    def pool(self, x):
        """Hidden states (B, T, C) -> a vector (B, C) for the whole text, from [CLS]."""
        return torch.tanh(self.pooler(x[:, 0]))

    def forward(self, ids, segments=None, attention_mask=None, targets=None, next_targets=None,
                num_targets=None, num_next_targets=None, **inputs):
        """
        ids (B, T) -> logits (B, T, V), and no loss. With targets (B, T): logits (N, V) only where a
        token has a target, to save memory: V is large, and one token in seven has one. With
        next_targets (B,) alone: logits (B, 2). The loss is the sum of both: appendix A.2 of [3].
        """
        x = self.hidden(ids, segments=segments, attention_mask=attention_mask, **inputs)
        losses = []
        if next_targets is not None:
            logits = self.nsp_head(self.pool(x))                           # (B, 2)
            losses.append(cross_entropy(logits, next_targets, num_next_targets))
        if targets is not None:
            places = (targets != IGNORE_INDEX).nonzero(as_tuple=True)      # (N,) rows, (N,) columns
            logits = self.mlm_logits(x[places])                            # (N, V)
            losses.append(cross_entropy(logits, targets[places], num_targets))
        return (logits, sum(losses)) if losses else (self.mlm_logits(x), None)

class EncoderDecoder(LanguageModel):
    """
    The Transformer of 2017 [1], and T5 [4]. The encoder reads the source, the decoder writes the
    target: each token sees the target so far and, by cross-attention, the source.
    """

    def __init__(self, config):
        super().__init__(config)
        self.encoder = Stack(config, self.tokens, causal=False)
        self.decoder = Stack(config, self.tokens, causal=True, cross=True)
        self.output = Output(config, self.tokens)
        init_weights(self)

    def forward(self, ids, attention_mask=None, decoder_ids=None, targets=None, num_targets=None,
                **inputs):
        """
        ids and attention_mask (B, S) of the source; decoder_ids (B, T), a start token and
        the target (teacher forcing) -> logits (B, T, V), and the loss where targets are given.
        Other inputs go to the encoder alone.
        """
        memory = self.encoder(ids, attention_mask=attention_mask, **inputs)  # (B, S, C)
        return super().forward(decoder_ids, targets=targets, num_targets=num_targets,
                               memory=memory, memory_mask=attention_mask)  # its padding is last

    def encode(self, ids, attention_mask=None, size=None):
        """Read the source once: a KVCache to decode `size` tokens with (default: block_size)."""
        memory = self.encoder(ids, attention_mask=attention_mask)
        return KVCache(size or self.config.block_size, memory, attention_mask)

class TaskModel(nn.Module):
    """
    A pre-trained trunk and one new linear layer: section 4 of [3].

    classify   one label for a text: BERT reads it at [CLS], a decoder at its last token, which is
               the only one that saw all of it
    tag        one label for every token
    qa         two places in a text: where does the answer begin, where does it end?

    If you read or answer otherwise, call it a task of your own: an export of these would be wrong.
    """

    def __init__(self, config, trunk):
        super().__init__()
        self.config, self.trunk = config, trunk
        self.drop = Dropout(config.dropout)
        n = 2 if config.task == 'qa' else config.n_labels or 1             # 1: a task of your own
        self.head = nn.Linear(config.n_embd, n)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids, segments=None, attention_mask=None, targets=None, num_targets=None,
                **inputs):
        """
        ids (B, T) -> logits, and the loss where targets are given. Logits and targets: classify
        (B, L) and (B,), tag (B, T, L) and (B, T), qa (B, 2, T) and (B, 2), whose targets are the
        places of the first and the last token of the answer.
        """
        task = self.config.task
        whole_text = task not in ('tag', 'qa')                             # classify, or your own
        x = self.trunk.hidden(ids, segments=segments, attention_mask=attention_mask, **inputs)
        real = torch.ones_like(ids) if attention_mask is None else attention_mask
        attention_mask = real.bool()                                       # it may hold 1 and 0
        if whole_text and self.config.arch == 'bert':
            x = self.trunk.pool(x)                                         # (B, C)
        elif whole_text:
            x = x[torch.arange(len(x), device=x.device), real.sum(dim=1) - 1]  # the last, (B, C)
        logits = self.head(self.drop(x))
        if task == 'qa':
            logits = logits.transpose(1, 2)                                # (B, 2, T)
            lowest = torch.finfo(logits.dtype).min  # no answer lies in the padding
            logits = logits.masked_fill(~attention_mask[:, None], lowest)
        return logits, cross_entropy(logits, targets, num_targets)

def optimizer_groups(model, weight_decay):
    """
    The trainable weights in three groups: `embeddings` (tables, output layers and heads: a row for
    each token, position or label), `matrices` (other weights of two dimensions), and `vectors` (all
    others, such as biases and norms), which get no weight decay.
    """
    tables = r'(\b|_)(tokens|positions|segments|relative_bias|output|head)\.weight'  # add yours
    groups = {'matrices': [], 'embeddings': [], 'vectors': []}
    for name, p in model.named_parameters():  # a tied weight comes once
        kind = 'embeddings' if re.search(tables, name) else 'matrices' if p.ndim == 2 else 'vectors'
        if p.requires_grad:
            groups[kind].append(p)
    return [{'name': kind, 'params': params,
             'weight_decay': 0.0 if kind == 'vectors' else weight_decay}
            for kind, params in groups.items() if params]

# -----------------------------------------------------------------------------
# From a configuration to a model, to a file, and back

MODELS = {'gpt': GPT, 'bert': BERT, 'encdec': EncoderDecoder, 'lstm': LSTM}

def build(config):
    """A new model with random weights."""
    trunk = MODELS[config.arch](replace(config, task='', n_labels=0))
    return TaskModel(config, trunk) if config.task else trunk

def num_parameters(model):
    return sum(p.numel() for p in model.parameters())  # a tied one comes once

def write_file(path, write):
    """
    Write a file whole or not at all: write(f) fills a temporary file in the same folder, which then
    takes the place of the old one. Raises OSError.
    """
    path = os.path.realpath(path)                                          # a link stays a link
    temporary = Path(f'{path}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        for seconds in (0.1, 1, 5):  # Windows refuses while another program has the old file open
            with contextlib.suppress(PermissionError):
                return os.replace(temporary, path)
            time.sleep(seconds)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # a RuntimeError is how torch reports a full disk
        reason = ' '.join(str(e.__context__ or e).split())[:200]
        raise OSError(f"{path} cannot be written ({reason}): make room or change the folder") from e
    finally:
        temporary.unlink(missing_ok=True)

def save(path, model, /, **extra):
    """
    Write a checkpoint: tensors and plain data only, so that opening one runs no code. extra: other
    entries, such as those of another checkpoint; sample.py needs its tokenizer, task and labels.
    """
    weights = getattr(model, '_orig_mod', model).state_dict()              # it may be compiled
    data = extra | {'config': asdict(model.config), 'model': weights}
    write_file(path, lambda f: torch.save(data, f))

@contextlib.contextmanager
def reading(path, remedy):
    """Turn errors inside into ValueError with a remedy, except for a missing or forbidden file."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as e:
        with contextlib.suppress(OSError), open(path, 'rb') as f:
            require(f.read(19) != b'version https://git',
                    f"{path} is a git-LFS pointer: fetch the file itself")
        reason = ' '.join(str(e).split()).split('. ')[0][:120]
        raise ValueError(f"{path} cannot be read ({type(e).__name__}: {reason}): {remedy}") from e

def find_checkpoint(path):
    """path -> a checkpoint file or a Hugging Face folder, from the hub if it is not on the disk."""
    here = Path(path)
    if here.is_file() and here.suffix in ('.safetensors', '.bin', '.json'):
        here = here.parent
    else:
        for found in (here, here / 'best.pt', here / 'ckpt.pt'):
            if found.is_file():
                return found
    if not here.is_dir():
        with contextlib.suppress(Exception):  # not installed, no network, or no such model
            from huggingface_hub import snapshot_download
            here = Path(snapshot_download(path, allow_patterns=[
                '*.json', 'model*.safetensors', '*.txt', '*.model']))
    require(any(here.glob('model*')) or not (here / 'adapter_config.json').exists(),
            f"{path} is an adapter, without its model: merge the two first, with peft")
    if (here / 'config.json').exists():
        return here
    raise FileNotFoundError(
        f"there is no checkpoint {path}, be it a .pt file, an out folder or one of Hugging Face: "
        f"train one with python train.py, or download https://huggingface.co/{path} into a "
        "folder (pip install huggingface_hub does so itself)")

def load(path, device='cpu', **changes):
    """
    path -> (model in eval mode, checkpoint). path is a checkpoint, an out folder (its best.pt, else
    its ckpt.pt), a Hugging Face folder, or the name of a model on the hub. `changes` are fields of
    Config that may differ from the file: see resize. Raises FileNotFoundError or ValueError.
    """
    path = find_checkpoint(os.fspath(path))
    if path.is_dir():
        model, checkpoint = from_huggingface(path)
    else:
        with reading(path, "it is damaged, or of another version or program: choose another"):
            with zipfile.ZipFile(path) as parts:  # its checksums, which torch.load does not compare
                require(parts.testzip() is None, "a part of it is damaged")
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)  # runs no code
            model = build(Config(**checkpoint['config']))
            model.load_state_dict(checkpoint['model'])
    for name, p in model.named_parameters():
        require(p.sum().isfinite(), f"{path}: the weight {name} holds NaN or infinity")
    return resize(model, path, **changes).to(device).eval(), checkpoint

def resize(model, path, **changes):
    """
    The same weights under other fields of Config. A smaller block_size or vocab_size drops the last
    rows of a table, a larger vocab_size adds rows near their mean. A larger block_size raises
    ValueError, except where positions have no end ('relative', 'none'); path is for its message.
    """
    old, config = model.config, replace(model.config, **changes)
    if config == old:
        return model
    # with these positions a model does not read well beyond its block_size
    has_end = config.positions in ('learned', 'sinusoids', 'rotary')
    require(config.block_size <= old.block_size or not has_end,
            f"block_size={config.block_size} is longer than the {old.block_size} that {path} was "
            "trained with: choose at most that")
    weights, model = model.state_dict(), build(config)
    for name, p in model.state_dict().items():
        rows = weights[name]
        if rows.shape != p.shape:
            more = rows.mean(dim=0) + 0.01 * torch.randn_like(p)
            weights[name] = torch.cat([rows, more])[:len(p)]
    model.load_state_dict(weights)
    return model

# =============================================================================
# The Transformer ends here. What follows is other people's names for it: how Hugging Face writes
# down the same models, to load theirs and to export ours. The same tables serve both directions.

def pairs(text):
    """'a=b c' -> {'a': 'b', 'c': 'c'}"""
    split = (pair.partition('=') for pair in text.split())
    return {a: b or a for a, _, b in split}

@dataclass
class Family:
    """How Hugging Face writes down one family of models."""
    preset: str           # what an empty config.json means; its row of RECIPES trains it
    classes: dict         # their class -> task; the first one of a task is exported
    fields: dict          # field of config.json -> field of Config
    activations: dict     # theirs -> ours; the last of several names is exported
    prefix: str           # of all names except output layers and heads
    names: dict           # part of a name of a weight -> theirs; the first that fits counts
    dropped: str          # regex of tensors that are copies or constants
    may_lack: str = '$^'  # regex of tensors that start anew where a folder lacks them

USUAL_FIELDS = pairs("""vocab_size max_position_embeddings=block_size hidden_size=n_embd
    num_hidden_layers=n_layer num_attention_heads=n_head tie_word_embeddings=tied""")
LLAMA_FIELDS = USUAL_FIELDS | pairs("""head_dim num_key_value_heads=n_kv_head rope_theta
    intermediate_size=mlp_dim hidden_act=activation rms_norm_eps=norm_eps""")
PLAIN = pairs('gelu_fast=gelu_tanh gelu_pytorch_tanh=gelu_tanh gelu_new=gelu_tanh '
              'gelu_python=gelu gelu relu relu2')
FAMILIES = {
    'gpt2': Family(
        'gpt2-124m', {'GPT2LMHeadModel': '', 'GPT2Model': ''},
        pairs("""vocab_size n_positions=block_size n_embd n_layer n_head n_inner=mlp_dim
            activation_function=activation layer_norm_epsilon=norm_eps tie_word_embeddings=tied
            scale_attn_weights=scale_attention"""),
        PLAIN, 'transformer.',
        pairs("""tokens=wte decoder.embed.positions=wpe decoder.norm=ln_f decoder.blocks=h
            attn_norm=ln_1 mlp_norm=ln_2 .q=.c_attn.q .k=.c_attn.k .v=.c_attn.v proj=c_proj fc=c_fc
            output=lm_head"""),
        r'h\.\d+\.attn\.(masked_)?bias|lm_head\.weight'),
    'bert': Family(
        'bert-base', {
            'BertForPreTraining': '', 'BertForMaskedLM': '', 'BertForNextSentencePrediction': '',
            'BertModel': '', 'BertForSequenceClassification': 'classify',
            'BertForTokenClassification': 'tag', 'BertForQuestionAnswering': 'qa'},
        USUAL_FIELDS | pairs("""intermediate_size=mlp_dim hidden_act=activation
            layer_norm_eps=norm_eps type_vocab_size=segments"""),
        PLAIN, 'bert.',
        pairs("""tokens=embeddings.word_embeddings encoder.embed=embeddings
            positions=position_embeddings segments=token_type_embeddings blocks=layer
            attn_norm=attention.output.LayerNorm attn.proj=attention.output.dense
            attn=attention.self .q=.query .k=.key .v=.value mlp_norm=output.LayerNorm
            mlp.fc=intermediate.dense mlp.proj=output.dense output=cls.predictions.decoder
            transform_norm=cls.predictions.transform.LayerNorm norm=LayerNorm
            transform=cls.predictions.transform.dense pooler=pooler.dense
            nsp_head=cls.seq_relationship head=classifier"""),
        r'embeddings\.position_ids|cls\.predictions\.(decoder\.)?(weight|bias)',
        r'(pooler|cls)\..*'),
    't5': Family(
        't5-small', {'T5ForConditionalGeneration': '', 'T5WithLMHeadModel': '', 'T5Model': ''},
        pairs("""vocab_size n_positions=block_size d_model=n_embd d_kv=head_dim d_ff=mlp_dim
            num_layers=n_layer num_heads=n_head feed_forward_proj=activation
            layer_norm_epsilon=norm_eps relative_attention_num_buckets=buckets
            relative_attention_max_distance=max_distance tie_word_embeddings=tied
            scale_decoder_outputs=scale_output"""),
        pairs('relu gated-gelu=geglu gated-silu=swiglu gelu_new=gelu_tanh gelu relu2'), '',
        pairs("""tokens=shared blocks=block attn_norm=layer.0.layer_norm
            cross_norm=layer.1.layer_norm mlp_norm=layer.2.layer_norm norm=final_layer_norm
            attn=layer.0.SelfAttention cross=layer.1.EncDecAttention
            mlp.proj=layer.2.DenseReluDense.wo mlp=layer.2.DenseReluDense gate=wi_0 fc=wi_1 proj=o
            relative_bias=block.0.layer.0.SelfAttention.relative_attention_bias output=lm_head"""),
        r'(en|de)coder\.embed_tokens\.weight|.*EncDecAttention\.relative_attention_bias\.weight|'
        r'lm_head\.weight'),
    'llama': Family(
        'llama-7b', {'LlamaForCausalLM': '', 'LlamaModel': ''},
        LLAMA_FIELDS | pairs('attention_bias=bias mlp_bias=bias'),
        pairs('swish=swiglu silu=swiglu gelu_new=geglu gelu_pytorch_tanh=geglu'), 'model.',
        pairs("""tokens=embed_tokens decoder.norm=norm decoder.blocks=layers
            attn_norm=input_layernorm mlp_norm=post_attention_layernorm attn=self_attn
            .q=.q_proj .k=.k_proj .v=.v_proj mlp.gate=mlp.gate_proj mlp.fc=mlp.up_proj
            mlp.proj=mlp.down_proj proj=o_proj output=lm_head"""),
        r'.*rotary_emb\.inv_freq|lm_head\.weight',
        r'.*_proj\.bias'),  # there are models with biases in the attention alone
}
FAMILIES['mistral'] = replace(  # Jiang et al. 2023: a Llama with a window
    FAMILIES['llama'], classes={'MistralForCausalLM': '', 'MistralModel': ''},
    fields=LLAMA_FIELDS | {'sliding_window': 'window'})
ROPE = ('rope_type', 'factor', 'low_freq_factor', 'high_freq_factor',
        'original_max_position_embeddings')  # the words of Config.rope_scaling

# Fields that change what a model computes, and that at most some families read. For the others such
# a field must be null or have the value below; where that is None: null, false, 0 or empty.
UNSUPPORTED = dict.fromkeys("""
    add_cross_attention attention_bias attention_sinks final_logit_softcapping is_decoder
    layer_types mlp_bias num_experts num_local_experts pruned_heads quantization_config
    scale_attn_by_inverse_layer_idx sliding_window""".split()) | {
        'partial_rotary_factor': 1, 'position_embedding_type': 'absolute',
        'problem_type': 'single_label_classification'}
# Fields of most files that say nothing of the computation, or that config_from reads by name.
FAMILIAR = re.compile(
    '_.*|architectures|model_type|type|transformers.*|.*dtype|(?!forced).*token_id|.*label.*|n_ctx|'
    'tokenizer_class|.*drop(out)?(_.*)?|initializer_.*|use_cache|task_specific_params|is_.*|'
    'pretraining_tp|(summary|pooler|output|rope)_.*|return_dict|(.*_)?factor|original_max.*|'
    'directionality|gradient_checkpointing|reorder_and_upcast_attn|dense_act_fn|'
    'num_decoder_layers|max_new_tokens|tie_word_embeddings|chunk_size_feed_forward')

def config_from(theirs):
    """
    What a config.json means: (Config, labels, names of fields that are not read). Raises ValueError
    naming the first field of UNSUPPORTED that is set. An unknown activation or scaling of rotary
    positions is left for Config to refuse.
    """
    kind = theirs.get('model_type')
    require(kind in FAMILIES, f"model_type must be one of {', '.join(FAMILIES)}, not {kind}")
    family, values, not_read = FAMILIES[kind], {}, []
    must_be = UNSUPPORTED | {'is_causal': kind != 'bert' or None,  # None: it must be false
                             'num_decoder_layers': theirs.get('num_layers', 6)}
    known = USUAL_FIELDS | family.fields  # GPT-2's and T5's may have the usual names, too
    rope = theirs.get('rope_scaling') or theirs.get('rope_parameters') or {}
    rope = {'rope_type': rope.get('type', 'default')} | rope               # type: its older name
    for name, value in (theirs | rope).items():
        ours = known.get(name)
        if ours == 'window':
            value = str(value or 0)                                        # null: no window
        if value is None or (name, value) == ('type_vocab_size', 0):  # a BERT there has segments
            continue
        if ours == 'activation':
            value = family.activations.get(value, f'{name}={value}')
        if ours:
            values[ours] = value or values.get(ours, value)  # bias: one of Llama's two is enough
        elif name in must_be:
            require((value or None) == must_be[name], f"{name}={value!r} is not supported here")
        elif not FAMILIAR.fullmatch(name):
            not_read.append(name)
    if kind == 't5':
        values.setdefault('scale_output', values.get('tied', True))
    if kind == 'mistral':
        values.setdefault('window', '4096')
    if rope['rope_type'] != 'default':
        values['rope_scaling'] = ' '.join(str(rope.get(name)) for name in ROPE)
    architecture = (theirs.get('architectures') or [*family.classes])[0]
    require(architecture in family.classes, f"architectures={architecture} is not supported here")
    task, labels = family.classes[architecture], []
    if task == 'qa':  # as sample.py exports it
        labels = (theirs.get('task_specific_params') or {}).get('labels', [])
    elif task:
        named = theirs.get('id2label') or {
            i: f'LABEL_{i}' for i in range(theirs.get('num_labels', 2))}
        labels = [str(named[i]) for i in sorted(named, key=int)]
        require(sorted(map(int, named)) == [*range(len({*labels}))],
                f"id2label={named}: must name each label from 0 on once")
        require(len(labels) > 1, "a head with one label is a regression, which is not supported")
    values |= {'task': task, 'n_labels': len(labels)}
    return replace(PRESETS[family.preset], **values), labels, sorted(not_read)

def config_to(kind, config):
    """A Config as a config.json. What that cannot express is lost: see export_huggingface."""
    family = FAMILIES[kind]
    classes = [name for name, task in family.classes.items() if task == config.task]
    activations = {ours: theirs for theirs, ours in family.activations.items()}
    values = asdict(config) | {'activation': activations.get(config.activation),
                               'window': int(config.window.split()[0])}
    theirs = {'model_type': kind, 'architectures': classes[:1]}
    theirs |= {name: values[ours] for name, ours in family.fields.items()}
    if config.n_labels:
        theirs['num_labels'] = config.n_labels
    if 'rope_theta' in theirs:
        rope_type, *numbers = config.rope_scaling.split() or ['default']
        theirs['rope_scaling'] = dict(zip(ROPE, [rope_type, *map(json.loads, numbers)]))
    return theirs

def hf_name(family, config, name):
    """Their name of a weight of ours, without the prefix: GPT-2's ln_f for decoder.norm."""
    pattern = '|'.join(map(re.escape, family.names))
    theirs = re.sub(pattern, lambda match: family.names[match[0]], name.removeprefix('trunk.'))
    theirs = re.sub(r'(encoder\.block\.\d+\.layer)\.2', r'\1.1', theirs)  # T5: no cross-attention
    if config.activation not in GATED:
        theirs = theirs.replace('.wi_1', '.wi')  # T5's name where there is no gate
    if config.task == 'qa':
        theirs = theirs.replace('classifier', 'qa_outputs')
    return theirs

def hf_layout(name, t):
    """Our weight as their files have it, or theirs as ours: each change undoes itself."""
    if '.c_' in name and t.dim() == 2:
        return t.mT  # a matrix of GPT-2 is (inputs, outputs)
    return t.flip(0) if name.startswith('cls.seq_relationship') else t  # class 0: B follows A

def read_tensors(folder, family):
    """{name without prefix: tensor} of a folder. GPT-2's c_attn is split into q, k and v."""
    names = 'model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin'
    files, tensors = [Path(folder, name) for name in names], {}
    first = next(filter(Path.exists, files), files[0])  # the others may be of an earlier save
    paths = [first]
    if first.suffix == '.json':
        with reading(first, "fetch it again"):
            names = json.loads(first.read_bytes())['weight_map'].values()
            paths = [Path(folder, name) for name in {*names}]
    for path in paths:
        require(path.exists(), f"there is no {path}: fetch it, or if there is only a "
                "pytorch_model.bin, save that as safetensors, by save_pretrained of transformers")
        with reading(path, "fetch it again, or save it as safetensors, by save_pretrained of "
                     "transformers, and pip install safetensors"), open(path, 'rb'):
            from safetensors.torch import load_file
            for name, t in load_file(path).items():
                name = name.removeprefix(family.prefix).replace('.gamma', '.weight')
                name = name.replace('.beta', '.bias')  # as BERT's files had it in 2018
                tensors[name] = hf_layout(name, t)
                if '.c_attn.' in name:
                    for part, piece in zip('qkv', tensors.pop(name).chunk(3)):
                        tensors[name.replace('c_attn', f'c_attn.{part}')] = piece
    return tensors

def from_huggingface(folder):
    """
    A Hugging Face folder -> (model, checkpoint), which lists the tensors that were `dropped`, the
    weights that are `new` because the folder lacks them, and the fields that were `not_read`.
    Raises ValueError naming the field or tensor that does not fit.
    """
    path = Path(folder, 'config.json')
    with reading(path, "choose another model, or fetch it again"):
        theirs = json.loads(path.read_bytes())
        config, labels, not_read = config_from(theirs)
    family = FAMILIES[theirs['model_type']]
    tensors = read_tensors(folder, family)
    tokens = f"{family.names['tokens']}.weight"
    head = tensors.get(f"{family.names['output']}.weight")
    table = tensors.get(tokens, tensors.get('decoder.embed_tokens.weight'))
    if config.tied or theirs['model_type'] == 't5':  # tied, unless it has another head
        table = head if table is None else table  # a file may have the table as lm_head only
        config.tied = head is None or head.equal(table)
    tensors.setdefault(tokens, table)
    model, new = build(config), []
    if 'cls.predictions.bias' in tensors:  # its only name in older files; else a copy, or unused
        tensors.setdefault('cls.predictions.decoder.bias', tensors.pop('cls.predictions.bias'))
    for ours, p in model.named_parameters():
        name = hf_name(family, config, ours)
        t = tensors.pop(name, None)
        if t is None and re.fullmatch(family.may_lack, name):
            new.append(ours)
            continue
        require(t is not None and t.shape == p.shape,
                f"{folder}: the tensor {name} is missing, or its shape is not {tuple(p.shape)}")
        p.data.copy_(t)
    for name in tensors:
        require(re.fullmatch(family.dropped, name),
                f"{folder}: the tensor {name} is not part of the model that config.json describes")
    path = Path(folder, 'generation_config.json')
    if path.exists():  # how transformers chooses tokens: sample.py has flags for that
        with reading(path, "fetch it again"):
            not_read += [name for name in json.loads(path.read_bytes())
                         if not FAMILIAR.fullmatch(name)]
    return model, {'task': config.task, 'labels': labels, 'settings': {'preset': family.preset},
                   'dropped': sorted(tensors), 'new': new, 'not_read': not_read,
                   'folder': str(folder)}

def spell_out(config):
    """To compare configs: all sizes as numbers, and defaults for what only matters in training."""
    return replace(config, n_kv_head=config.kv_heads, head_dim=config.head_size, init='gpt2',
                   mlp_dim=config.mlp_dim or 4 * config.n_embd, dropout=0.0, label_smoothing=0.0,
                   n_labels=0 if config.task == 'qa' else config.n_labels)

def export_huggingface(model, folder, vocab_size=None, **fields):
    """
    Write config.json, with `fields` added, and model.safetensors, with the first vocab_size tokens
    (default: all). Raises ValueError naming the field of Config that no class of transformers has.
    """
    try:
        from safetensors.torch import save as to_bytes
    except ImportError as e:
        raise ValueError("exporting needs one more package: pip install safetensors") from e
    model = resize(model.cpu(), folder, vocab_size=vocab_size or model.config.vocab_size)
    config = spell_out(model.config)
    others = {'relative': 't5', 'rotary': 'llama' if config.window == '0' else 'mistral'}
    kind = 'bert' if config.arch == 'bert' else others.get(config.positions, 'gpt2')
    family, theirs = FAMILIES[kind], config_to(kind, config) | fields
    read_back = spell_out(config_from(theirs)[0])
    lost = [f'{name}={value}' for name, value in asdict(config).items()
            if value != getattr(read_back, name)]
    require(not lost, f"{kind} of transformers cannot express {', '.join(lost)}")
    require(not any(Path(folder).glob('*')), f"{folder} is not empty: choose another name")
    tensors = {}
    unused = r'cls\.' if config.task == 'classify' else r'(cls|pooler)\.'
    for ours, p in model.named_parameters():
        name = hf_name(family, config, ours)
        if config.task and re.match(unused, name):
            continue
        t = hf_layout(name, p.detach())
        if not re.match(r'(lm_head|cls|classifier|qa_outputs)\.', name):
            name = family.prefix + name
        name = re.sub(r'c_attn\.[qkv]', 'c_attn', name)
        if name in tensors:  # q, k and v come in this order
            t = torch.cat([tensors[name], t], dim=-1)
        tensors[name] = t.contiguous()
    if 'cls.predictions.decoder.bias' in tensors:
        tensors['cls.predictions.bias'] = tensors['cls.predictions.decoder.bias'].clone()
    os.makedirs(folder, exist_ok=True)
    text = json.dumps(theirs, ensure_ascii=False, indent=1)
    data = to_bytes(tensors, {'format': 'pt'})
    write_file(f'{folder}/model.safetensors', lambda f: f.write(data))
    write_file(f'{folder}/config.json', lambda f: f.write(text.encode()))
