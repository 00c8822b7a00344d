"""Low rank: weights as chains of smaller layers, ranks chosen by energy, budget or measured loss, with a proof."""

from paredown.factorize.verb import factorize

__all__ = ["factorize"]
