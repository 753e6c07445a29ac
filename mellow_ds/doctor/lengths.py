"""Findings about the lengths of texts: what is cut, and rows beyond the decoder's positions."""

from mellow_ds.doctor.facts import Case, TextFacts
from mellow_ds.doctor.findings import NOTE, SLOW, STOPS, Finding

_BOUND_MARGIN = 4  # times a sample's longest text: a bound beyond that costs nothing, as nothing is padded to it


def check_lengths(case: Case) -> list[Finding]:
    """Needs the sample of texts."""
    texts = case.texts
    if texts is None:
        return []
    data = case.config.data
    how = "estimated by characters" if texts.is_estimate else "counted with the run's tokenizer"
    found = []
    for what, cut, longest, key, limit in (
        ("prompts", texts.num_cut_prompts, texts.longest_prompt, "data.ip_text_len", data.ip_text_len),
        ("answers", texts.num_cut_answers, texts.longest_answer, "data.op_text_len", data.op_text_len),
    ):
        if cut:
            share = 100 * cut / texts.num_sampled
            loss = "the end of a question" if what == "prompts" else "the end of an answer, and with it end-of-text,"
            found.append(
                Finding(
                    SLOW, f"{what}-cut",
                    f"{cut} of {texts.num_sampled} sampled {what} ({share:.1f} percent) are longer than {key} {limit}; "
                    f"the longest has {longest} tokens ({how})",
                    f"{loss} is not seen in training",
                    f"set {key} to {longest}; rows are as long as their texts, whatever the limit is",
                )
            )  # fmt: skip
    if case.config.model.layout == "mellow" and data.ip_text_len > _BOUND_MARGIN * texts.longest_prompt:
        found.append(
            Finding(
                SLOW, "prompt-padding",
                f"model.layout mellow pads every prompt to data.ip_text_len {data.ip_text_len}; the longest of the "
                f"sample has {texts.longest_prompt} tokens",
                "padding is attended to and computed in every row", "take model.layout compact for new models",
            )
        )  # fmt: skip
    return [*found, *_positions(case, texts)]


def longest_possible_row(case: Case) -> int:
    """Tokens of a row with two clips, and prompt and answer at their limits."""
    assert case.model is not None
    data = case.config.data
    return 2 * (case.model.audio_tokens + 1) + data.ip_text_len + data.op_text_len


def _positions(case: Case, texts: TextFacts) -> list[Finding]:
    model = case.model
    if model is None or not model.max_positions:
        return []
    named = case.config.model.decoder.text_decoder
    if texts.longest_row > model.max_positions:
        reason = (
            "it has a table of positions, and there is no row for those beyond it"
            if model.has_position_table
            else "it never saw such positions in its own training, and answers there degrade"
        )
        return [
            Finding(
                STOPS if model.has_position_table else SLOW, "row-beyond-positions",
                f"a row of the sample has {texts.longest_row} tokens, but the decoder {named} has "
                f"{model.max_positions} positions",
                reason,
                "lower data.ip_text_len, data.op_text_len, model.encoder.audio_tokens or data.segment_seconds, or take "
                "a decoder with more positions",
            )
        ]  # fmt: skip
    bound = longest_possible_row(case)
    if model.has_position_table and bound > model.max_positions:
        return [
            Finding(
                NOTE, "row-may-pass-positions",
                f"a row of two clips with prompt and answer at their limits has {bound} tokens, but the decoder "
                f"{named} has {model.max_positions} positions; the longest of the sample has {texts.longest_row}",
                "one such example would end the run", "lower data.ip_text_len or data.op_text_len",
            )
        ]  # fmt: skip
    return []
