"""Chat templates render as the reference environment does, and cannot leave their sandbox."""

import json

import pytest

from hybridlm.errors import HybridLMError
from hybridlm.text import CHATML, ChatTemplate

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>\n"},
        {"role": "assistant", "content": "Hello"}]


def test_chatml():
    text = ChatTemplate.chatml().render(CHAT)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>\n<|im_end|>\n"
                    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert not ChatTemplate.chatml().render(CHAT, add_generation_prompt=False).endswith("assistant\n")
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert "user\nab<|im_end|>" in ChatTemplate.chatml().render(parts)


@pytest.mark.parametrize("source", [
    CHATML,
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content }}]\n  {% endif %}\n{% endfor %}\n",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ bos_token }}{{ eos_token }}",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m['content'] }}{% endfor %}",
    "{%- for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ tools }}",
])
def test_same_text_as_transformers(source):
    """Against Hugging Face's own renderer."""
    reference = pytest.importorskip("transformers.utils.chat_template_utils")
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = reference.render_jinja_template(conversations=[CHAT], chat_template=source,
                                                  add_generation_prompt=True, **tokens)
    assert ChatTemplate(source, special_tokens=tokens).render(CHAT) == expected[0]


@pytest.mark.parametrize("source", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({'content': 1}) }}",
    "{{ 'a' * 10**9 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ raise_exception('roles must alternate') }}",
    "{% include '/etc/passwd' %}",
    "{{ messages[0].content.format_map(1).x.y }}",
    "{{ 1 // 0 }}",
    "{% for %}",
])
def test_escapes_and_failures_are_one_clear_error(source):
    with pytest.raises(HybridLMError) as caught:
        ChatTemplate(source).render(CHAT)
    assert "chat template" in str(caught.value) and "\n" not in str(caught.value)


def test_endless_output_is_cut_off():
    source = "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 100000 }}{% endfor %}{% endfor %}"
    with pytest.raises(HybridLMError, match="grows without end"):
        ChatTemplate(source).render(CHAT)


def test_messages_are_checked():
    with pytest.raises(HybridLMError, match="entry 1"):
        ChatTemplate.chatml().render([CHAT[0], {"content": "x"}])


def test_finding_the_template(tmp_path):
    assert ChatTemplate.from_folder(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "</s>"}))
    assert ChatTemplate.from_folder(tmp_path) is None
    config.write_text(json.dumps({"chat_template": "A{{ eos_token }}", "eos_token": {"content": "</s>"}}))
    assert ChatTemplate.from_folder(tmp_path).render([]) == "A</s>"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.from_folder(tmp_path).render([]) == "D"
    (tmp_path / "chat_template.jinja").write_text("B")
    assert ChatTemplate.from_folder(tmp_path).render([]) == "B"
    config.write_text("{")
    with pytest.raises(HybridLMError, match="tokenizer_config"):
        ChatTemplate.from_folder(tmp_path)
