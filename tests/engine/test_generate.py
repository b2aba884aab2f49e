"""Generation: seeds, stop strings, ends, reuse. Over the float64 operations, with a real small tokenizer."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.helpers import reference_engine, small_config
from tests.text.helpers import byte_level

from hybridlm.engine import Piece
from hybridlm.engine.writer import HeldText
from hybridlm.errors import HybridLMError
from hybridlm.text import CHATML

TOKENIZER = byte_level()
CONFIG = small_config(vocab_size=TOKENIZER.vocab_size)


def text_engine(seed=0, template=None, **options):
    file = SimpleNamespace(tokenizer_json=TOKENIZER.to_json(), chat_template=template, close=lambda: None)
    return reference_engine(CONFIG, seed, file=file, **{"checkpoint_every": 32, **options})


def plain(engine, prompt, count, **options):
    """The same by hand: whole passes, one token at a time."""
    from hybridlm.engine import Sampler

    sampler, tokens = Sampler(**options), list(prompt)
    for _ in range(count):
        tokens.append(sampler.sample(engine.logits(tokens)[-1], tokens))
    return tokens[len(prompt):]


def test_tokens_are_those_of_whole_passes():
    engine = text_engine()
    prompt = engine.encode("the cat sat on")
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5},
                    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2,
                     "seed": 1}):
        generation = engine.generate(prompt, max_tokens=12, ignore_eos=True, **options)
        pieces = list(generation)
        assert generation.tokens == plain(engine, prompt, 12, **options)
        assert [p.token for p in pieces] == generation.tokens
        assert generation.text == TOKENIZER.decode(generation.tokens) == "".join(p.text for p in pieces)
        assert [p.finish for p in pieces] == [None] * 11 + ["length"]
        assert generation.finish_reason == "length" and generation.prompt_tokens == len(prompt)
        assert generation.prefill_seconds > 0 and generation.decode_tokens_per_s > 0


def test_a_seed_fixes_the_output():
    texts = [text_engine().generate("the mat", max_tokens=30, seed=s) for s in (1, 1, 2)]
    a, b, c = ([p.text for p in t] for t in texts)
    assert a == b != c


def test_text_and_ids_are_the_same_prompt_and_an_empty_one_begins_a_text():
    engine = text_engine()
    tokens = engine.encode("def f(x)")
    by_text, by_ids = (engine.generate(p, max_tokens=5, temperature=0) for p in ("def f(x)", tokens))
    assert list(by_text) == list(by_ids) and by_text.prompt == tokens
    assert engine.generate("", max_tokens=1).prompt == [TOKENIZER.eos]
    with pytest.raises(HybridLMError, match="prompt: empty"):
        reference_engine().generate([])


def test_eos_ends_the_text_and_is_not_part_of_it():
    engine = text_engine(seed=2)
    prompt = engine.encode("the cat")
    free = engine.generate(prompt, max_tokens=40, temperature=0, ignore_eos=True)
    list(free)
    ids = [t for i, t in enumerate(free.tokens) if t not in free.tokens[:i]]
    chosen = ids[min(3, len(ids) - 1)]
    at = free.tokens.index(chosen)
    engine.__dict__["eos"] = (chosen,)
    generation = engine.generate(prompt, max_tokens=40, temperature=0)
    pieces = list(generation)
    assert generation.tokens == free.tokens[:at] and generation.finish_reason == "eos"
    assert pieces[-1].token == chosen and pieces[-1].finish == "eos"
    assert generation.text == TOKENIZER.decode(generation.tokens)


@pytest.mark.parametrize("seed", range(4))
def test_stop_strings_end_the_text_wherever_tokens_divide_it(seed):
    engine = text_engine(seed)
    free = engine.generate("the", max_tokens=60, seed=seed, ignore_eos=True)
    list(free)
    rng = np.random.default_rng(seed)
    for _ in range(8):
        start = int(rng.integers(len(free.text) - 1))
        stops = [free.text[start:start + int(rng.integers(1, 8))], "never appears"]
        generation = engine.generate("the", max_tokens=60, seed=seed, ignore_eos=True, stop=stops)
        pieces = list(generation)
        assert generation.finish_reason == "stop" and pieces[-1].finish == "stop"
        assert generation.text == free.text[:free.text.index(stops[0])]
        assert free.tokens[:len(generation.tokens)] == generation.tokens
        shown = "".join(p.text for p in pieces)
        assert shown == generation.text
    generation = engine.generate("the", max_tokens=60, seed=seed, ignore_eos=True, stop="never appears")
    assert "".join(p.text for p in generation) == free.text and generation.finish_reason == "length"


@settings(deadline=None, max_examples=300)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), st.data())
def test_held_text_shows_all_that_is_certain_and_nothing_else(text, stops, data):
    held, shown, stopped, read = HeldText(stops), "", False, ""
    while len(read) < len(text) and not stopped:
        part = text[len(read):len(read) + data.draw(st.integers(1, 4))]
        read += part
        new, stopped = held.push(part)
        shown += new
        if not stopped:  # what is kept back may begin a stop; one character more shown could have been wrong
            hidden = read[len(shown):]
            assert not hidden or any(s.startswith(hidden) for s in stops)
            assert not any(s in read for s in stops)
    first = min((text.find(s) for s in stops if s in text), default=-1)
    # Reading stops as soon as any stop string is complete, which may be before an earlier-beginning one is.
    complete = min((text.find(s) + len(s) for s in stops if s in text), default=None)
    assert stopped == (complete is not None)
    if stopped:
        assert text.startswith(shown) and len(shown) >= first and read[len(shown):].startswith(tuple(stops))
    else:
        assert shown + held.rest() == text


def test_lengths():
    engine = text_engine(context=20)
    generation = engine.generate([1, 2, 3], max_tokens=0)
    assert list(generation) == [Piece(None, "", "length")] and generation.tokens == []
    generation = engine.generate([1, 2, 3], ignore_eos=True)
    assert len(list(generation)) == 17 and generation.finish_reason == "length"
    assert list(engine.generate([1] * 20)) == [Piece(None, "", "length")]
    for options, words in (({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"),
                           ({"temperature": -1}, "temperature"), ({"stop": ""}, "stop"), ({"stop": [3]}, "stop")):
        with pytest.raises(HybridLMError, match=f"^{words}"):
            engine.generate([1], **options)
    with pytest.raises(HybridLMError, match="the prompt has 21 tokens"):
        engine.generate([1] * 21)
    with pytest.raises(HybridLMError, match="vocabulary"):
        engine.generate([10**6])
    with pytest.raises(HybridLMError, match="stop"):
        reference_engine().generate([1], stop="x")


# -- reuse -----------------------------------------------------------------------------------------------------------


def cold(engine_options, prompt, **options):
    generation = text_engine(cache_bytes=0, **engine_options).generate(prompt, **options)
    list(generation)
    assert generation.reused_tokens == 0
    return generation.tokens


def test_a_second_turn_reads_only_what_is_new():
    engine = text_engine()
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, CONFIG.vocab_size, 100).tolist()
    first = engine.generate(prompt, max_tokens=40, temperature=0, ignore_eos=True)
    list(first)
    assert first.reused_tokens == 0
    second = prompt + first.tokens + rng.integers(0, CONFIG.vocab_size, 10).tolist()
    engine._ops.passes.clear()
    again = engine.generate(second, max_tokens=5, temperature=0, ignore_eos=True)
    list(again)
    assert again.reused_tokens == 139  # the 40th token was chosen but never read
    assert engine._ops.passes[0] == 11
    assert again.tokens == cold({}, second, max_tokens=5, temperature=0, ignore_eos=True)

    repeat = engine.generate(second, max_tokens=5, temperature=0, ignore_eos=True)
    list(repeat)
    assert repeat.reused_tokens == 139 and repeat.tokens == again.tokens  # 11 tokens were not worth a checkpoint


def test_the_same_prompt_again_is_not_read_at_all():
    engine = text_engine()
    prompt = list(range(90))
    a = engine.generate(prompt, max_tokens=3, temperature=0, ignore_eos=True)
    list(a)
    engine._ops.passes.clear()
    b = engine.generate(prompt, max_tokens=3, temperature=0, ignore_eos=True)
    list(b)
    assert b.reused_tokens == 90 and b.tokens == a.tokens and engine._ops.passes == [1, 1]


def test_an_edited_history_resumes_from_the_longest_checkpoint():
    engine = text_engine()
    rng = np.random.default_rng(1)
    prompt = rng.integers(0, CONFIG.vocab_size, 150).tolist()
    list(engine.generate(prompt, max_tokens=1, ignore_eos=True, checkpoints=[70]))
    for edit, expected in ((149, 128), (100, 96), (75, 70), (65, 64), (31, 0), (64, 64), (63, 32)):
        edited = prompt.copy()
        edited[edit] = (edited[edit] + 1) % CONFIG.vocab_size
        engine_options = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
        assert engine.cache.covered(edited) == expected
        generation = engine.generate(edited, **engine_options)
        list(generation)
        assert generation.reused_tokens == expected, edit
        assert generation.tokens == cold({}, edited, **engine_options)


def test_stopping_early_keeps_what_was_read():
    engine = text_engine()
    generation = engine.generate(list(range(50)), ignore_eos=True, temperature=0)
    for _ in range(30):
        next(generation)
    generation.close()
    assert engine.cache.covered(list(range(50)) + generation.tokens) == 79
    with pytest.raises(StopIteration):
        next(generation)


def test_an_interrupted_generation_leaves_no_trace_of_its_state():
    engine = text_engine()
    generation = engine.generate(list(range(50)), ignore_eos=True, temperature=0)
    for _ in range(20):
        next(generation)
    engine._ops.fail_in = 2
    with pytest.raises(KeyboardInterrupt):
        next(generation)
    assert engine.cache.covered(list(range(50)) + generation.tokens) == 50
    assert all(state.valid for state in engine.cache)


def test_cache_survives_on_disk(tmp_path):
    engine = text_engine()
    prompt = list(range(100)) * 2
    a = engine.generate(prompt, max_tokens=30, temperature=0, ignore_eos=True)
    list(a)
    assert engine.keep_cache(tmp_path / "cache", 10**9) == 0
    assert engine.cache.flush() == len(engine.cache) > 5 and engine.cache.flush() == 0
    count = len(engine.cache)
    with pytest.raises(HybridLMError, match="another process"):
        text_engine().keep_cache(tmp_path / "cache", 10**9)
    engine.close()
    fresh = text_engine()
    assert fresh.keep_cache(tmp_path / "cache", 10**9) == count and fresh.cache.nbytes == 0
    again = prompt + a.tokens + [5, 6]
    b = fresh.generate(again, max_tokens=8, temperature=0, ignore_eos=True)
    list(b)
    assert b.reused_tokens == 229 and b.tokens == cold({}, again, max_tokens=8, temperature=0, ignore_eos=True)
    fresh.close()
    for other in (text_engine(seed=1), text_engine(kv_type="f16")):
        with pytest.raises(HybridLMError, match="another model"):
            other.keep_cache(tmp_path / "cache", 10**9)
    assert text_engine().keep_cache(tmp_path / "cache", 10**9) >= count


def test_an_evicted_checkpoint_comes_back_from_the_disk(tmp_path):
    engine = text_engine(cache_bytes=1)  # holds one at a time
    engine.keep_cache(tmp_path / "cache", 10**9)
    engine.cache._spilling.maxsize = 0  # a disk that falls behind would let some go
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 300, 70).tolist() for _ in range(4)]
    first = []
    for prompt in prompts:
        generation = engine.generate(prompt, max_tokens=5, temperature=0, ignore_eos=True)
        list(generation)
        first.append(generation.tokens)
        engine.cache._spilling.join()
    for prompt, tokens in zip(prompts, first, strict=True):
        generation = engine.generate(prompt, max_tokens=5, temperature=0, ignore_eos=True)
        list(generation)
        assert generation.reused_tokens >= 64 and generation.tokens == tokens
        engine.cache._spilling.join()
    assert engine.cache.stats.reloaded >= 3


def test_chat_keeps_the_end_of_the_turn_whatever_opens_the_answer():
    thinking = CHATML.replace("assistant\\n'", "assistant\\n<think>'")
    assert thinking != CHATML
    engine = text_engine(template=thinking, checkpoint_every=10_000)
    messages = [{"role": "user", "content": "the cat sat on the mat and the cat sat on the mat"}]
    first = engine.chat(messages, max_tokens=20, temperature=0, ignore_eos=True)
    list(first)
    assert TOKENIZER.decode(first.prompt).endswith("assistant\n<think>")
    messages += [{"role": "assistant", "content": "that is that"}, {"role": "user", "content": "and?"}]
    second = engine.chat(messages, max_tokens=2, temperature=0, ignore_eos=True)
    list(second)
    # All of the first turn up to the answer's opening, give or take one token where the two texts part.
    end = engine.encode(engine.chat_template.render(messages[:1], add_generation_prompt=False))
    assert len(end) - 1 <= second.reused_tokens <= len(end)
    assert second.tokens == cold({"template": thinking}, second.prompt, max_tokens=2, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("ending", ["length", "eos", "stop"])
def test_the_next_turn_of_a_chat_continues_the_very_tokens_that_were_said(ending):
    """A random model writes tokens that its text would not be encoded to; the next turn must know them anyway."""
    engine = text_engine(template=CHATML, checkpoint_every=10_000)
    messages = [{"role": "user", "content": "the cat sat on the mat"}]
    options = {"max_tokens": 40, "seed": 3, "ignore_eos": True}
    free = engine.chat(messages, **options)
    list(free)
    if ending == "eos":
        engine.__dict__["eos"] = (free.tokens[30],)
        options["ignore_eos"] = False
    if ending == "stop":
        options["stop"] = TOKENIZER.decode(free.tokens[25:32])
    engine.cache.clear()
    first = engine.chat(messages, **options)
    list(first)
    assert first.finish_reason == ending and TOKENIZER.encode(first.text) != first.tokens
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "and that?"}]
    second = engine.chat(messages, max_tokens=2)
    list(second)
    said = len(first.prompt) + len(first.tokens)
    assert TOKENIZER.decode(second.prompt) == engine.chat_template.render(messages)
    if ending == "stop":
        # The state has read into the stop string, which the next turn does not repeat: only the turn before is kept.
        assert second.reused_tokens == len(TOKENIZER.encode(engine.chat_template.render(messages[:1], False)))
    else:
        assert second.prompt[:said] == first.prompt + first.tokens and second.reused_tokens >= said - 1
    messages[1]["content"] = first.text + "!"  # edited: encoded anew
    third = engine.chat(messages, max_tokens=2)
    list(third)
    assert third.prompt == TOKENIZER.encode(engine.chat_template.render(messages))


def test_a_zero_budget_keeps_nothing_and_threads_share_one_cache():
    engine = text_engine(cache_bytes=0)
    list(engine.generate(list(range(60)), max_tokens=20, ignore_eos=True))
    assert len(engine.cache) == 0 and engine.cache.nbytes == 0

    import threading

    engine = text_engine()
    prompts = [list(range(40)) + [i] * (10 + i) for i in range(6)]
    expected = [cold({}, p, max_tokens=6, temperature=0, ignore_eos=True) for p in prompts]
    got = {}

    def run(i):
        generation = engine.generate(prompts[i], max_tokens=6, temperature=0, ignore_eos=True)
        list(generation)
        got[i] = generation.tokens

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [got[i] for i in range(6)] == expected
