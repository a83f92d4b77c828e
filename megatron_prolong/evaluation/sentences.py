"""Sentence splitting with nltk's punkt model, which is data that nltk does not bring along."""

from __future__ import annotations

from megatron_prolong.errors import UserError


def split_sentences(text: str) -> list[str]:
    """Sentences of English text (nltk.sent_tokenize); never downloads.

    Raises:
        UserError: the model is not installed, with the command that installs it.
    """
    import nltk

    try:
        return list(nltk.sent_tokenize(text))
    except LookupError as error:
        raise UserError(
            "splitting sentences needs nltk's punkt_tab data, which is not on this machine; run\n"
            "  python -m nltk.downloader punkt_tab\n"
            "where there is a network, or copy tokenizers/punkt_tab into a directory that NLTK_DATA names"
        ) from error
