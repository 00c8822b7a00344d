"""Low rank: weights as chains of smaller layers, ranks chosen by energy, budget or measured loss, with a proof."""

from paredown.factorize.choose import choose_ranks
from paredown.factorize.decompose import Factoring
from paredown.factorize.verb import factorize

__all__ = ["Factoring", "choose_ranks", "factorize"]
