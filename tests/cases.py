"""Models for the tests: what a direct rule must be exact for, and what must go through the loop and say so."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm


class ResidualBlock(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return self.relu(y)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = (z.view(n, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(n, t, -1))


class TransformerLM(nn.Module):
    def __init__(self, vocabulary=29, width=16, layers=2, length=9, positions="arange"):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=0)
        self.positions = nn.Embedding(length + 3, width)
        self.kind = positions
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "attention": Attention(width, 2),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        n, t = ids.shape
        places = torch.arange(t)
        if self.kind == "broadcast":
            places = places[None]
        elif self.kind == "expanded":
            places = places.expand(n, t)
        elif self.kind == "reversed":
            places = places.flip(0)
        x = self.positions.weight[:t] if self.kind == "slice" else self.positions(places)
        x = self.tokens(ids) + x
        for block in self.blocks:
            x = x + block["attention"](block["norm1"](x))
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        return self.head(self.norm(x))


class Lambda(nn.Module):
    """A model of a few parameters and one expression, given as a function of the module and the batch."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))

    def forward(self, x):
        return self.function(self, x)


def images(n=5, channels=3, size=9):
    return torch.randn(n, channels, size, size)


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=8, padding="same"),  # depthwise
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, groups=4, padding=1, stride=2),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Conv2d(12, 40, 3, dilation=2, padding=2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(160, 5),
    )


def resnet():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        ResidualBlock(8, 8, 1),
        ResidualBlock(8, 12, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model


def padded(mode, axes):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return nn.Sequential(conv(2, 4, 3, padding=2, padding_mode=mode), nn.Tanh(), conv(4, 3, 2, stride=2), nn.Flatten(1))


def norms():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.GroupNorm(3, 6),
        nn.Tanh(),  # without it the instance norm would cancel the bias before it: a gradient of rounding errors
        nn.Conv2d(6, 6, 1, bias=False),
        nn.InstanceNorm2d(6, affine=True),
        nn.Tanh(),
        nn.LayerNorm([6, 7, 7]),
        nn.Flatten(2),
        nn.RMSNorm(49, eps=1e-5),
        nn.BatchNorm1d(6),
        nn.Linear(49, 3),
    )


def hf_conv1d(self, x):
    """GPT-2's layer: addmm over flattened tokens, so samples are folded into the first axis."""
    h = self.tokens(x)
    h = torch.addmm(self.b, h.view(-1, h.shape[-1]), self.w).view(*h.shape[:2], -1)
    return (h * torch.sigmoid(h)) @ self.v


def broadcasts(self, x):
    x = x + self.shift - self.minus
    x = self.scale * x / self.divisor
    x = torch.mul(x, self.row) + torch.rsub(self.column, x)
    x = self.over / (2 + x.square())
    x *= self.inplace
    x += self.late
    return x * self.scalar


def token(self, x):
    x = torch.cat([self.cls.expand(len(x), -1, -1), self.register.repeat(len(x), 1, 1), x @ self.embed], 1)
    return (x + self.positions)[:, 0] @ self.head.T


def packed(self, x):
    """One packed weight, used through disjoint chunks and views."""
    q, k, v = self.in_proj.chunk(3)
    bq, bk, bv = self.in_bias.view(3, -1)
    scores = F.linear(x, q, bq) @ F.linear(x, k, bk).mT
    return scores.softmax(-1) @ F.linear(x, v, bv)


def time_first(self, x):
    """[N, T, C] in, but all layers see [T, N, C]."""
    h = self.inner(x.transpose(0, 1))
    return self.out(torch.tanh(h + self.bias)).transpose(0, 1).flatten(1)


def folded(self, x, inner=False):
    """Windows folded into the batch, sample index outer or inner."""
    n, t, c = x.shape
    windows = x.transpose(0, 1).reshape(t * n, c) if inner else x.reshape(n * t, c)
    h = torch.tanh(self.norm(self.linear(windows)))
    return (h.view(t, n, -1).transpose(0, 1) if inner else h.view(n, t, -1)).flatten(1)


def frames(self, x):
    n, t = x.shape[:2]
    h = torch.tanh(self.norm(self.conv(x.flatten(0, 1))))
    return self.head(h.unflatten(0, (n, t)).mean((1, 3, 4)))


def _d(width, *shape):
    return torch.randn(*shape, width) / math.sqrt(width)


# name -> builder of (model, batch); every parameter must be served by a rule
DIRECT = {
    "mlp": lambda: (nn.Sequential(nn.Linear(7, 9), nn.ReLU(True), nn.Linear(9, 3)), torch.randn(6, 7)),
    "mlp_no_bias_wide": lambda: (
        nn.Sequential(nn.Linear(40, 70, bias=False), nn.Tanh(), nn.Linear(70, 33)),
        torch.randn(6, 40),
    ),
    "convnet": lambda: (convnet(), images()),
    "resnet": lambda: (resnet(), images()),
    "norms": lambda: (norms(), images()),
    "transformer": lambda: (TransformerLM(), torch.randint(0, 29, (7, 9))),
    "transformer_t_equals_n": lambda: (TransformerLM(), torch.randint(0, 29, (9, 9))),
    "transformer_broadcast_positions": lambda: (TransformerLM(positions="broadcast"), torch.randint(0, 29, (7, 9))),
    "transformer_expanded_positions": lambda: (TransformerLM(positions="expanded"), torch.randint(0, 29, (7, 9))),
    "transformer_reversed_positions": lambda: (TransformerLM(positions="reversed"), torch.randint(0, 29, (7, 9))),
    "transformer_sliced_positions": lambda: (TransformerLM(positions="slice"), torch.randint(0, 29, (7, 9))),
    **{
        f"conv{axes}d_{mode}": lambda axes=axes, mode=mode: (padded(mode, axes), torch.randn(4, 2, *[6] * axes))
        for axes in (1, 2, 3)
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "conv_same_even_kernel": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, (2, 4), padding="same", dilation=(1, 3))),
        images(),
    ),
    "gpt2_addmm": lambda: (
        Lambda(hf_conv1d, tokens=nn.Embedding(11, 6), w=_d(8, 6), b=torch.randn(8), v=_d(5, 8)),
        torch.randint(0, 11, (4, 5)),
    ),
    "broadcasts": lambda: (
        Lambda(
            broadcasts,
            shift=torch.randn(6),
            minus=torch.randn(4, 1),
            scale=torch.randn(1, 4, 6),
            divisor=torch.rand(6) + 1,
            row=torch.randn(1, 6),
            column=torch.randn(4, 1),
            over=torch.randn(6),
            inplace=torch.randn(4, 6),
            late=torch.randn(6),
            scalar=torch.randn(()),
        ),
        torch.randn(5, 4, 6),
    ),
    "interleaved_broadcast": lambda: (Lambda(lambda m, x: x * m.w, w=torch.randn(3, 1, 4)), torch.randn(6, 3, 5, 4)),
    "token": lambda: (
        Lambda(
            token,
            cls=_d(8, 1, 1),
            register=_d(8, 1, 2),
            embed=_d(8, 5),
            positions=_d(8, 1, 7),
            head=_d(8, 3),
        ),
        torch.randn(6, 4, 5),
    ),
    "packed_projection": lambda: (
        Lambda(packed, in_proj=_d(8, 24), in_bias=torch.randn(24)),
        torch.randn(5, 4, 8),
    ),
    "time_first": lambda: (
        Lambda(time_first, inner=nn.Linear(5, 8), bias=torch.randn(8), out=nn.Linear(8, 2)),
        torch.randn(6, 4, 5),
    ),
    "time_first_t_equals_n": lambda: (
        Lambda(time_first, inner=nn.Linear(5, 8), bias=torch.randn(8), out=nn.Linear(8, 2)),
        torch.randn(4, 4, 5),
    ),
    "folded_outer": lambda: (Lambda(folded, linear=nn.Linear(5, 8), norm=nn.LayerNorm(8)), torch.randn(6, 4, 5)),
    "folded_inner": lambda: (
        Lambda(lambda m, x: folded(m, x, inner=True), linear=nn.Linear(5, 8), norm=nn.BatchNorm1d(8)),
        torch.randn(6, 4, 5),
    ),
    "frames": lambda: (
        Lambda(frames, conv=nn.Conv2d(3, 6, 3), norm=nn.GroupNorm(2, 6), head=nn.Linear(6, 2)),
        torch.randn(4, 3, 3, 6, 6),
    ),
    "matmul_transposed_view": lambda: (
        Lambda(lambda m, x: torch.tanh(x @ m.w.T) @ m.v.mT, w=_d(5, 8), v=_d(8, 3)),
        torch.randn(6, 5),
    ),
    "shared_ids_gather": lambda: (
        Lambda(lambda m, x: x + m.table[torch.tensor([3, 0, 2])], table=_d(5, 4)),
        torch.randn(6, 3, 5),
    ),
    "one_dimensional_ids": lambda: (
        Lambda(lambda m, x: m.head(torch.tanh(m.users(x))), users=nn.Embedding(9, 6), head=nn.Linear(6, 2)),
        torch.tensor([3, 1, 4, 1, 5]),
    ),
    "consecutive_ids_are_samples": lambda: (
        Lambda(lambda m, x: m.head(torch.tanh(m.users(x))), users=nn.Embedding(9, 6), head=nn.Linear(6, 2)),
        torch.arange(2, 7),
    ),
    "scalar_output_per_sample": lambda: (nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), torch.randn(6, 5)),
}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


def tied(self, ids):
    return torch.tanh(self.tokens(ids)) @ self.tokens.weight.T


def shared(self, x):
    return self.layer(torch.tanh(self.layer(x)))


def unseen(self, x):
    return self.head(Doubled.apply(x, self.w))


def assigned(self, x):
    h = self.linear(x).clone()
    h[:, 0] = self.cls
    return h


def assembled(self, x):
    """A weight that is written into a buffer, which is made for it."""
    w = torch.zeros(3, 5, dtype=x.dtype)
    w[:2] = self.w
    w[2:] = self.v * 2
    return F.linear(x, w)


def edited(self, x):
    w = self.w * 2
    w.mul_(3.0)
    v = self.w.clone()
    v[0] = 0
    return F.linear(x, w) + F.linear(x, v)


def repeated(self, x):
    """A parameter that is written into a row for every sample."""
    shift = x.new_zeros(len(x), 5)
    shift[:] = self.w[0]
    return F.linear(x + shift, self.w)


def made(self, x):
    """Constants that are made from data without looking at it, and held in lists and dicts."""
    w = self.w * x.new_tensor([1.0, 2.0, 3.0, 4.0, 5.0]) + torch.full_like(x[0], 2.0)
    return F.linear(x, w * self.scales[0] + self.named["shift"])


def with_constants(model):
    model.scales = [torch.rand(5, dtype=torch.float64)]
    model.named = {"shift": torch.rand(5, dtype=torch.float64)}
    return model


def edited_after_use(self, x):
    w = self.w * 2
    h = F.linear(x, w)
    w.mul_(3.0)
    return h + F.linear(x, w)


def edited_view(self, x):
    w = self.w.clone()
    row = w[0]
    row.mul_(3.0)
    return F.linear(x, w) + row[0]


def data_in_a_buffer(self, x):
    """A buffer is made of nothing, and then written full of data."""
    h = torch.zeros(len(x), 5, dtype=x.dtype)
    h[:] = self.inner(x)
    return self.outer(h) + x[:, :1]


def accumulated(self, x):
    total = torch.zeros_like(x)
    total += self.inner(x)
    total += self.bias
    return self.outer(total) + x[:, :1]


def experts_by_index(self, x):
    out = torch.zeros_like(x)
    for expert, wanted in ((self.inner, x[:, 0] > 0), (self.other, x[:, 0] <= 0)):
        places = wanted.nonzero()[:, 0]
        out.index_add_(0, places, expert(x[places]))
    return self.outer(out) + x[:, :1]


def hooked(self, x):
    """The gradient of a part of a weight is changed by a hook."""
    q, k = self.w.split([2, 3])
    q.register_hook(lambda gradient: gradient * 0.1)
    return torch.cat([F.linear(x, q), F.linear(x, k)], 1)


def token_in_a_buffer(self, x):
    out = x.new_zeros(len(x), 3, 5)
    out[:, 1:] = self.inner(x)[:, None]
    out[:, 0] = self.cls
    return self.outer(out)


def looped_in_a_product(self, x):
    """A parameter that takes the loop, and is a factor of one that does not."""
    return Doubled.apply(F.linear(x, self.w * self.b), self.b)


def mixed_selection(self, x):
    """Overlapping slices of one parameter: their gradients must be summed first."""
    return F.linear(x, self.w[:4]) + F.linear(x, self.w[2:])


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).T


def symmetric(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def siamese(self, x):
    return self.head((self.trunk(x) - self.trunk(x.flip(1))).abs())


def halves(self, x):
    """Samples spread over two tensors of one batch, unevenly."""
    middle = len(x) // 2
    return torch.cat([self.layer(part).tanh() for part in (x[:middle], x[middle:])])


def experts(self, x):
    """Tokens routed to experts by their values."""
    h = x.reshape(-1, x.shape[-1])
    weight, choice = self.gate(h).softmax(-1).max(-1)
    y = torch.zeros_like(h)
    for number, expert in enumerate(self.experts):
        own = (choice == number).nonzero().squeeze(1)
        y = y.index_add(0, own, expert(h[own]) * weight[own, None])
    return y.view_as(x)


def encoder_decoder(self, ids):
    """One table for the encoder, the decoder and the head."""
    h = torch.tanh(self.layer(self.table(ids)))
    return F.linear(h + self.table(ids.flip(1)), self.table.weight)


def learned_states(self, x):
    states = [state.expand(1, len(x), 5).contiguous() for state in (self.h, self.c)]
    return self.lstm(x, tuple(states))[0]


def packed_lengths(self, x):
    """Sequences of lengths that the data say, sorted by length as packing does."""
    lengths = x[:, 0, 0].abs().mul(100).long() % 4 + 1
    sequences = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return self.lstm(sequences)[1][0][-1]


def relative_bias(self, x):
    places = torch.arange(x.shape[1])
    scores = x @ x.mT + self.bias[places[:, None] - places + x.shape[1] - 1]
    return scores.softmax(-1) @ x


# name -> builder of (model, batch): reused and derived parameters, whose gradients are summed before |·|
JOINED = {
    "data_in_a_buffer": lambda: (
        Lambda(data_in_a_buffer, inner=nn.Linear(5, 5), outer=nn.Linear(5, 50)),
        torch.randn(6, 5),
    ),
    "accumulated": lambda: (
        Lambda(accumulated, inner=nn.Linear(5, 5), outer=nn.Linear(5, 50), bias=torch.randn(5)),
        torch.randn(6, 5),
    ),
    "experts_by_index": lambda: (
        Lambda(experts_by_index, inner=nn.Linear(5, 5), outer=nn.Linear(5, 50), other=nn.Linear(5, 5)),
        torch.randn(8, 5),
    ),
    "hooked": lambda: (Lambda(hooked, w=torch.randn(5, 5)), torch.randn(6, 5)),
    "assembled": lambda: (Lambda(assembled, w=torch.randn(2, 5), v=torch.randn(1, 5)), torch.randn(6, 5)),
    "edited": lambda: (Lambda(edited, w=torch.randn(3, 5)), torch.randn(6, 5)),
    "repeated": lambda: (Lambda(repeated, w=torch.randn(3, 5)), torch.randn(6, 5)),
    "made": lambda: (with_constants(Lambda(made, w=torch.randn(3, 5))), torch.randn(6, 5)),
    "lstm": lambda: (
        Lambda(lambda m, x: m.lstm(x)[0][:, -1], lstm=nn.LSTM(4, 5, batch_first=True)),
        torch.randn(4, 3, 4),
    ),
    "lstm_both_ways": lambda: (
        Lambda(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True)),
        torch.randn(4, 3, 4),
    ),
    "lstm_time_first": lambda: (
        Lambda(lambda m, x: m.lstm(x.transpose(0, 1))[0].transpose(0, 1), lstm=nn.LSTM(4, 5, 2)),
        torch.randn(4, 4, 4),
    ),
    "lstm_projected": lambda: (
        Lambda(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(4, 5, 2, batch_first=True, proj_size=3)),
        torch.randn(4, 3, 4),
    ),
    "lstm_learned_states": lambda: (
        Lambda(learned_states, lstm=nn.LSTM(4, 5, batch_first=True), h=torch.randn(1, 1, 5), c=torch.randn(1, 1, 5)),
        torch.randn(4, 3, 4),
    ),
    "lstm_packed": lambda: (Lambda(packed_lengths, lstm=nn.LSTM(4, 5, 2, batch_first=True)), torch.randn(5, 4, 4)),
    "lstm_cell": lambda: (
        Lambda(lambda m, x: m.cell(x[:, 1], m.cell(x[:, 0]))[0], cell=nn.LSTMCell(4, 5)),
        torch.randn(4, 3, 4),
    ),
    "gru": lambda: (
        Lambda(lambda m, x: m.gru(x)[0], gru=nn.GRU(4, 5, 2, batch_first=True)),
        torch.randn(4, 3, 4),
    ),
    "rnn": lambda: (
        Lambda(lambda m, x: m.rnn(x)[1][0], rnn=nn.RNN(4, 5, 2, batch_first=True)),
        torch.randn(4, 3, 4),
    ),
    "weight_norm": lambda: (
        Lambda(lambda m, x: m.b(torch.tanh(m.a(x))), a=weight_norm(nn.Linear(5, 6)), b=weight_norm(nn.Linear(6, 2))),
        torch.randn(6, 5),
    ),
    "weight_norm_conv": lambda: (nn.Sequential(weight_norm(nn.Conv1d(3, 4, 3)), nn.Flatten()), torch.randn(4, 3, 7)),
    "spectral_norm": lambda: (spectral_norm(nn.Linear(5, 6)), torch.randn(6, 5)),
    "orthogonal": lambda: (orthogonal(nn.Linear(5, 5)), torch.randn(6, 5)),
    "parametrization": lambda: (symmetric(nn.Linear(5, 5)), torch.randn(6, 5)),
    "low_rank": lambda: (
        Lambda(lambda m, x: F.linear(x, m.w + 2 * m.b @ m.a), w=_d(5, 6), a=_d(5, 2), b=_d(2, 6)),
        torch.randn(7, 5),
    ),
    "softplus": lambda: (
        Lambda(lambda m, x: x * F.softplus(m.scale) + m.layer(x), scale=torch.randn(5), layer=nn.Linear(5, 5)),
        torch.randn(6, 5),
    ),
    "concatenated": lambda: (
        Lambda(lambda m, x: F.linear(x, torch.cat([m.a, m.b])), a=_d(5, 3), b=_d(5, 2)),
        torch.randn(6, 5),
    ),
    "stacked": lambda: (
        Lambda(lambda m, x: torch.einsum("nd,kod->nko", x, torch.stack([m.a, m.b])), a=_d(5, 3), b=_d(5, 3)),
        torch.randn(6, 5),
    ),
    "hypernetwork": lambda: (
        Lambda(lambda m, x: F.linear(x, m.make(m.z).view(3, 5)), make=nn.Linear(4, 15), z=torch.randn(4)),
        torch.randn(6, 5),
    ),
    "cosine_classifier": lambda: (
        Lambda(lambda m, x: F.linear(F.normalize(x), F.normalize(m.w)), w=_d(5, 3)),
        torch.randn(6, 5),
    ),
    "siamese": lambda: (
        Lambda(
            siamese,
            trunk=nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(12, 6)),
            head=nn.Linear(6, 2),
        ),
        torch.randn(4, 2, 5),
    ),
    "shared_convolution": lambda: (
        Lambda(lambda m, x: m.conv(torch.tanh(m.conv(x))).flatten(1), conv=nn.Conv2d(3, 3, 3, padding=1)),
        torch.randn(4, 3, 5, 5),
    ),
    "samples_in_two_tensors": lambda: (Lambda(halves, layer=nn.Linear(5, 6)), torch.randn(7, 5)),
    "routed_experts": lambda: (
        Lambda(experts, gate=nn.Linear(4, 3), experts=nn.ModuleList(nn.Linear(4, 4) for _ in range(3))),
        torch.randn(4, 5, 4),
    ),
    "encoder_decoder": lambda: (
        Lambda(encoder_decoder, table=nn.Embedding(9, 5), layer=nn.Linear(5, 5)),
        torch.randint(0, 9, (4, 3)),
    ),
    "relative_bias": lambda: (Lambda(relative_bias, bias=torch.randn(7)), torch.randn(3, 4, 5)),
    "attention_time_first": lambda: (
        Lambda(
            lambda m, x: m.attention(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1),
            attention=nn.MultiheadAttention(6, 2),
        ),
        torch.randn(5, 5, 6),
    ),
    "cross_attention": lambda: (
        Lambda(
            lambda m, x: m.attention(x, x[:, :2, :4], x[:, :2, :5])[0],
            attention=nn.MultiheadAttention(6, 2, kdim=4, vdim=5, batch_first=True, add_bias_kv=True),
        ),
        torch.randn(5, 4, 6),
    ),
    "transformer_module": lambda: (
        Lambda(
            lambda m, x: m.head(m.transformer(x, x[:, :2])),
            transformer=nn.Transformer(6, 2, 1, 1, 12, batch_first=True),
            head=nn.Linear(6, 3),
        ),
        torch.randn(5, 4, 6),
    ),
    "encoder_module": lambda: (
        Lambda(
            lambda m, x: m.head(m.encoder(x)),
            encoder=nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), 2),
            head=nn.Linear(6, 3),
        ),
        torch.randn(5, 4, 6),
    ),
    "tied": lambda: (Lambda(tied, tokens=nn.Embedding(7, 5)), torch.randint(0, 7, (4, 3))),
    "shared": lambda: (Lambda(shared, layer=nn.Linear(5, 5)), torch.randn(6, 5)),
    "overlapping_slices": lambda: (Lambda(mixed_selection, w=_d(5, 6)), torch.randn(6, 5)),
    "scaled_weight": lambda: (Lambda(lambda m, x: x @ (0.5 * m.w), w=_d(4, 5)), torch.randn(6, 5)),
    "scaled_weight_square": lambda: (Lambda(lambda m, x: x @ (0.5 * m.w), w=_d(6, 6)), torch.randn(6, 6)),
    "exp_of_weight": lambda: (
        Lambda(lambda m, x: m.head(x * m.log_scale.exp()), log_scale=torch.randn(5), head=nn.Linear(5, 2)),
        torch.randn(6, 5),
    ),
    "weight_on_the_left": lambda: (Lambda(lambda m, x: (m.w @ x.T).T, w=_d(5, 3)), torch.randn(6, 5)),
    "repeated_rows": lambda: (
        Lambda(lambda m, x: x + m.table[torch.tensor([1, 1, 0])], table=_d(5, 2)),
        torch.randn(6, 3, 5),
    ),
    "attention_module": lambda: (
        Lambda(lambda m, x: m.attention(x, x, x)[0], attention=nn.MultiheadAttention(6, 2, batch_first=True)),
        torch.randn(5, 4, 6),
    ),
}

# name -> builder of (model, batch, names of the parameters that must take the loop)
LOOPED = {
    "token_in_a_buffer": lambda: (
        Lambda(token_in_a_buffer, inner=nn.Linear(5, 5), outer=nn.Linear(5, 50), cls=torch.randn(5)),
        torch.randn(6, 5),
        {"cls"},
    ),
    "looped_in_a_product": lambda: (
        Lambda(looped_in_a_product, w=torch.randn(5, 5), b=torch.randn(5)),
        torch.randn(6, 5),
        {"w", "b"},
    ),
    "edited_after_use": lambda: (Lambda(edited_after_use, w=torch.randn(3, 5)), torch.randn(6, 5), {"w"}),
    "edited_view": lambda: (Lambda(edited_view, w=torch.randn(3, 5)), torch.randn(6, 5), {"w"}),
    "custom_function": lambda: (Lambda(unseen, w=torch.randn(5), head=nn.Linear(5, 2)), torch.randn(6, 5), {"w"}),
    "assignment": lambda: (Lambda(assigned, linear=nn.Linear(5, 3), cls=torch.randn(())), torch.randn(6, 5), {"cls"}),
}


def build(builder):
    """Build a case from a fixed seed, in eval mode, in float64."""
    torch.manual_seed(7)
    model, batch, *rest = builder()
    return model.double().eval(), batch.double() if batch.is_floating_point() else batch, *rest
