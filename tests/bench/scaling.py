"""
Scaling laws in miniature: how the loss falls with the size of a model and with the tokens that it sees, and which size is
the best where compute is fixed.

    python tests/bench/scaling.py --plot scaling.png          on Python's documentation, 25 minutes on two cores
    python tests/bench/scaling.py --input shakespeare.txt     on another text

Models of the `nano` preset, of one depth and with the learning rates of its recipe, predict the bytes of a text. The loss is
that of the whole validation split, in nats a byte; the learning rate of each run has just come to its end.

    equal tokens     every width sees the same tokens                             L = E + A N^-alpha
    more data        one width sees 1/8, 1/4, ... of them                         L = E + B D^-beta
    equal compute    C = 6 N D is the same, so small models see more tokens       L = a parabola in log N

N is the number of weights without embedding and output, as [1] counts; bytes as tokens keep those two small. D is the number
of tokens seen, again and again where the text is shorter. E of either law is what stays however large N, or D, becomes.

    [1] Kaplan et al. 2020, Scaling Laws for Neural Language Models, https://arxiv.org/abs/2001.08361
    [2] Hoffmann et al. 2022, Training Compute-Optimal Large Language Models (Chinchilla), https://arxiv.org/abs/2203.15556
"""

import argparse
import os
import re
import tempfile

import numpy as np
from common import command, table

import prepare_data

BATCH, BLOCK = 32, 64

def power_law(size, loss):
    """
    (E, A, alpha, whether E is at an end of its range) of L = E + A size^-alpha, by least squares. For each E of a grid
    log(L - E) is a straight line in log size; weights of (L - E)^2 make the errors of that logarithm errors of L again. The
    E is taken whose curve comes nearest to the losses.
    """
    E = np.linspace(0, loss.min(), 500, endpoint=False)[:, None]                       # (E, 1), beside (runs,)
    x, y, w = np.log(size), np.log(loss - E), (loss - E) ** 2
    w /= w.sum(axis=1, keepdims=True)
    mean = lambda values: (w * values).sum(axis=1, keepdims=True)
    dx, dy = x - mean(x), y - mean(y)
    alpha = -mean(dx * dy) / mean(dx ** 2)
    log_A = mean(y) + alpha * mean(x)
    i = ((E + np.exp(log_A - alpha * x) - loss) ** 2).sum(axis=1).argmin()
    return E[i, 0], np.exp(log_A[i, 0]), alpha[i, 0], i in (0, len(E) - 1)

def parabola(size, loss):
    """(a, b, c, whether there is no lowest point between the sizes) of L = a log(size)^2 + b log(size) + c."""
    a, b, c = np.polyfit(np.log(size), loss, 2)
    return a, b, c, not (a > 0 and np.log(size.min()) < -b / (2 * a) < np.log(size.max()))

def curve(law, size, fitted):
    return fitted[0] + fitted[1] * size ** -fitted[2] if law is power_law else np.polyval(fitted[:3], np.log(size))

def describe(what, law, size, loss, figures):
    """Fit, and print the figures {name: function of the fit}, each with where nine of ten fits lie to losses drawn anew around
    the curve, as far from it as the runs are. Returns the fit, None where so few runs do not determine it."""
    fitted, free, rng = law(size, loss), len(loss) - 3, np.random.default_rng(0)
    if free < 1 or len(set(size)) < 4:
        return print(f'{what}: a curve with three unknowns needs more than three sizes')
    noise = np.sqrt(((loss - curve(law, size, fitted)) ** 2).sum() / free)
    draws = [law(size, curve(law, size, fitted) + rng.normal(0, noise, len(loss))) for _ in range(500)]
    good = [draw for draw in draws if not draw[3]]
    if fitted[3] or len(good) < 0.9 * len(draws):
        lost = f'in {1 - len(good) / len(draws):.0%} of such fits: take more runs, farther apart'
        return print(f'{what}: not to be had, since ' + (
            f'E is at the end of its range {lost}. Without E, as in [1], the exponent is '
            f'{-np.polyfit(np.log(size), np.log(loss), 1)[0]:.4g}' if law is power_law else
            f'the lowest point is not between the sizes {lost}'))
    bounds = {name: np.quantile([of(draw) for draw in good], [0.05, 0.95]) for name, of in figures.items()}
    print(f'{what}: ' + ', '.join(f'{name} {of(fitted):,.4g} ({bounds[name][0]:,.4g} to {bounds[name][1]:,.4g})'
                                  for name, of in figures.items()))
    return fitted

def draw_picture(path, panels, fits, Figure):
    axes = Figure(figsize=(5 * len(panels), 4), layout='constrained').subplots(1, len(panels), sharey=True)
    for ax, (title, label, law, size, loss), fitted in zip(axes, panels, fits):
        ax.scatter(size, loss, color='black', s=15)
        if fitted:
            x = np.geomspace(size.min(), size.max())
            ax.plot(x, curve(law, x, fitted))
        ax.set(title=title, xlabel=f'{label}, thousands', xscale='log')
        ax.minorticks_off()
        ax.set_xticks(np.unique(size), [f'{x / 1000:,.0f}' for x in np.unique(size)], fontsize=8)
    axes[0].set_ylabel('validation loss (nats a byte)')
    axes[0].figure.savefig(path, dpi=120)

def check_fits():
    """Losses that are made up must give back what they were made of."""
    size, noise = np.geomspace(1e5, 1e7, 8), np.random.default_rng(0).normal(0, 1e-3, 8)
    law = describe('made-up law (1.2, 0.4)', power_law, size, 1.2 + 40 * size ** -0.4 + noise,
                   {'E': lambda fit: fit[0], 'alpha': lambda fit: fit[2]})
    best = describe('made-up best (14)', parabola, size, 2 + 0.1 * (np.log(size) - 14) ** 2 + noise,
                    {'log N': lambda fit: -fit[1] / (2 * fit[0])})
    if not law or not best or not np.allclose([law[0], law[2], -best[1] / (2 * best[0])], [1.2, 0.4, 14], rtol=0.1):
        raise ValueError(f'the fits are wrong: {law}, {best}')

def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', default='pydoc', help='a text file, or pydoc: what Python says of itself')
    parser.add_argument('--widths', nargs='+', type=int, default=[24, 32, 48, 64, 96, 128, 192], help='n_embd')
    parser.add_argument('--layers', type=int, default=4)
    parser.add_argument('--steps', type=int, default=800, help=f'of {BATCH} x {BLOCK} tokens, where tokens are equal')
    parser.add_argument('--parts', nargs='+', type=float, default=[1 / 8, 1 / 4, 1 / 2, 1, 2], help='of steps, of one width')
    parser.add_argument('--seeds', type=int, default=2, help='runs of each kind, with seeds 1, 2, ...')
    parser.add_argument('--plot', default='', help='picture to draw, such as scaling.png')
    parser.add_argument('--quick', action='store_true', help='see in half a minute that all of it works')
    args = parser.parse_args(argv)
    if args.plot:  # now, not after all trainings: it may be missing
        from matplotlib.figure import Figure
    if args.quick:
        check_fits()
        args.widths, args.layers, args.steps, args.parts, args.seeds = [16, 32, 48], 1, 20, [1 / 2, 1], 1
    widths = sorted(set(args.widths))
    N = {width: 10 * args.layers * width ** 2 for width in widths}  # exactly: nano has no biases, and norms no weights
    D = lambda steps: steps * BATCH * BLOCK
    middle, one = widths[(len(widths) - 1) // 2], widths[-2]
    kinds = {'equal tokens': [(width, args.steps) for width in widths],
             'more data': [(one, max(1, round(args.steps * part))) for part in args.parts],
             'equal compute': [(width, max(1, round(args.steps * N[middle] / N[width]))) for width in widths]}
    runs, rows = sorted({run for kind in kinds.values() for run in kind}), []
    found = {run: [] for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        source = ['--dataset', 'pydoc'] if args.input == 'pydoc' else ['--input', os.path.abspath(args.input)]
        command('prepare_data.py', *source, '--tokenizer', 'byte', '--out_dir', 'data/text', cwd=folder)
        for seed in range(1, args.seeds + 1):
            for width, steps in runs:
                prepare_data.progress(f'seed {seed} of {args.seeds}: {width} wide, {steps} steps')
                seconds, _ = command('train.py', '--dataset', 'text', '--preset', 'nano', '--n_embd', width, '--n_layer',
                                     args.layers, '--batch_size', BATCH, '--block_size', BLOCK, '--max_iters', steps,
                                     '--eval_interval', steps, '--eval_iters', 1, '--sample_tokens', 0, '--seed', seed,
                                     cwd=folder)
                _, said = command('train.py', '--eval_only', cwd=folder)
                found[width, steps].append((float(re.search(r'loss ([\d.]+)', said)[1]), seconds))
    prepare_data.progress('')
    for width, steps in runs:
        losses, seconds = np.transpose(found[width, steps])
        rows.append([f'{width}', f'{N[width]:,}', f'{D(steps):,}', f'{6 * N[width] * D(steps):.2e}', f'{losses.mean():.4f}',
                     f'{np.ptp(losses):.4f}', seconds.mean(), ', '.join(k for k in kinds if (width, steps) in kinds[k])])
    table(['width', 'N', 'tokens D', 'C = 6 N D', 'loss', 'of seeds', 'seconds', 'used for'], rows)

    def points(kind, of):
        """(of(width, steps), loss) of all runs of a kind, one a seed."""
        return np.transpose([(of(*run), loss) for run in kinds[kind] for loss, _ in found[run]])
    weights, compute = lambda width, steps: N[width], 6 * N[middle] * D(args.steps)
    lowest = lambda fit: np.exp(-fit[1] / (2 * fit[0]))
    panels = [(f'{D(args.steps):,} tokens', 'weights N', power_law, *points('equal tokens', weights)),
              (f'{N[one]:,} weights', 'tokens D', power_law, *points('more data', lambda width, steps: D(steps))),
              (f'C = {compute:.2e}', 'weights N', parabola, *points('equal compute', weights))]
    print('\nIn brackets: where nine of ten fits lie to losses drawn anew, as far from the curve as the runs are.')
    fits = [describe(f'{panel[0]}, {text}', *panel[2:], figures) for panel, text, figures in zip(
        panels, ('L = E + A N^-alpha', 'L = E + B D^-beta', 'the best size'),
        ({'E': lambda fit: fit[0], 'A': lambda fit: fit[1], 'alpha': lambda fit: fit[2]},
         {'E': lambda fit: fit[0], 'B': lambda fit: fit[1], 'beta': lambda fit: fit[2]},
         {'N': lowest, 'tokens a weight': lambda fit: compute / 6 / lowest(fit) ** 2}))]
    if fits[0] and fits[1]:
        print(f'So the best N grows like C^{fits[1][2] / (fits[0][2] + fits[1][2]):.2f}: beta / (alpha + beta), equation 4 '
              'of [2], whose own is 0.46; 0.73 in [1].')
    if args.plot:
        draw_picture(args.plot, panels, fits, Figure)

if __name__ == '__main__':
    prepare_data.run(main)
