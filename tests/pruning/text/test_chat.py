"""Conversations become the tokens that transformers makes of them."""

import json

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pruning.text.conversation import Conversation
from pruning.text.tokenizer import open_codec

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|turn|>", "[INST]", "[/INST]"]
CHATML = """{%- if tools %}
<|im_start|>system
You may call:
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}
<|im_end|>
{% endif %}
{% for message in messages %}
<|im_start|>{{ message.role }}
{% if message.reasoning_content is defined and loop.last %}
<think>{{ message.reasoning_content }}</think>
{% endif %}
{{ message.content }}{% for call in message.tool_calls or [] %}
{%- set call = call.function or call %}
<call>{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}</call>{% endfor %}
<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
HEADERS = """{{ bos_token }}{% set ns = namespace(seen=0) %}
{%- for message in messages %}
    {%- if message['role'] == 'tool' and not ns.seen %}
        {{- raise_exception('a tool answers before it was called') }}
    {%- endif %}
    {%- set ns.seen = ns.seen + 1 %}
    {%- if message.role == 'assistant' %}{% generation %}
        {{- '<|head|>assistant<|head|>\\n\\n' + message['content'] | trim + '<|turn|>' }}
    {%- endgeneration %}{% else %}
        {{- '<|head|>' + message['role'] + '<|head|>\\n\\n' }}
        {{- message['content'] | trim + '<|turn|>' }}
    {%- endif %}
    {%- if ns.seen > 50 %}{% break %}{% endif %}
{%- endfor %}"""
BRACKETS = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}{{ ' [INST] ' + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}
{%- else %}{{ raise_exception('only users and assistants talk here, not ' ~ message.role) }}
{%- endif %}{% endfor %}"""
TALK = [
    {"role": "user", "content": "  Wie heißt du? 你叫什么? "},
    {"role": "assistant", "content": "Ich heiße Ω. <b>&amp;</b>"},
    {"role": "user", "content": "And 'now'?\n\n"},
    {"role": "assistant", "content": "It is 4 ☃."},
]
CALLS = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": "Weather in Zürich?"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "id": "c1",
         "function": {"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}}]},
    {"role": "tool", "tool_call_id": "c1", "content": '{"sky": "<blue>"}'},
    {"role": "assistant", "content": "Blue.", "reasoning": "The tool says so."},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "Météo",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]  # fmt: skip


def chat_folder(folder, **settings):
    """A checkpoint's tokenizer of bytes, with special tokens and whatever else it is set to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    given = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"},
             "tokenizer_class": "PreTrainedTokenizerFast", **settings}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return folder


def in_transformers(folder, talk) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(
        talk.messages, tools=talk.tools, tokenize=True, return_dict=False
    )


def as_file(folder, template):
    chat_folder(folder)
    (folder / "chat_template.jinja").write_text(template)


def as_setting(folder, template):
    chat_folder(folder, chat_template=template)


def as_named(folder, template):
    named = [{"name": "default", "template": "no tools: " + template},
             {"name": "tool_use", "template": template}]  # fmt: skip
    chat_folder(folder, chat_template=named)


@pytest.mark.parametrize("put", [as_file, as_setting, as_named])
@pytest.mark.parametrize(
    ("template", "talk"),
    [
        (CHATML, Conversation(TALK)),
        (CHATML, Conversation(CALLS, TOOLS)),
        (CHATML, Conversation(CALLS, [])),
        (HEADERS, Conversation(TALK)),
        (BRACKETS, Conversation(TALK)),
    ],
)
def test_a_conversation_is_token_for_token_what_transformers_makes_of_it(
    tmp_path, put, template, talk
):
    put(tmp_path, template)
    found = open_codec(tmp_path, 300).encode(talk)
    assert len(found) > 50
    assert found == in_transformers(tmp_path, talk)


def test_arguments_written_as_json_text_are_the_mapping_that_templates_expect(tmp_path):
    as_file(tmp_path, CHATML)
    texts = json.loads(json.dumps(CALLS))
    for call in texts[2]["tool_calls"]:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    codec = open_codec(tmp_path, 300)
    assert codec.encode(Conversation(texts, TOOLS)) == codec.encode(Conversation(CALLS, TOOLS))
    # What a model said that is no JSON stays as it said it.
    texts[2]["tool_calls"][0]["function"]["arguments"] = "{oops"
    assert '"{oops"' in codec.template.render(Conversation(texts, TOOLS))


def test_today_is_the_same_day_in_every_run(tmp_path):
    as_file(tmp_path, "{{ strftime_now('%d %B %Y') }}: {{ messages[0].content }}")
    found = open_codec(tmp_path, 300).template.render(Conversation(TALK[2:]))
    assert found.startswith("01 January 2026: And")


@pytest.mark.parametrize(
    ("template", "talk", "message"),
    [
        (BRACKETS, Conversation(CALLS), r"\(system, user, .*only users and assistants talk here, "
         r"not system; leave such rows out"),
        ("{% for m in messages %}", Conversation(TALK), r"is no jinja2 \(.*; get it again"),
        ("{{ messages.__class__.__mro__ }}", Conversation(TALK), "refuses a conversation"),
        ("{{ messages.append(1) }}", Conversation(TALK), "refuses a conversation"),
        (None, Conversation(TALK), "has no chat template, .* with --text-field"),
        ([{"name": "rag", "template": "x"}], Conversation(TALK), r"'default' \(found: rag\)"),
        ([{"name": "default"}], Conversation(TALK), r"'default' \(found: \)"),
        (["default"], Conversation(TALK), r"'default' \(found: \)"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_do_is_refused_with_a_cure(tmp_path, template, talk, message):
    as_setting(tmp_path, template)
    with pytest.raises(ValueError, match=message):
        open_codec(tmp_path, 300).encode(talk)


@pytest.mark.parametrize(
    ("template", "talk", "wanted"),
    [
        (CHATML, Conversation(TALK),
         ["Ich heiße Ω. <b>&amp;</b><|im_end|>", "It is 4 ☃.<|im_end|>"]),
        (HEADERS, Conversation(TALK),
         ["Ich heiße Ω. <b>&amp;</b><|turn|>", "It is 4 ☃.<|turn|>"]),
        (BRACKETS, Conversation(TALK),
         ["Ich heiße Ω. <b>&amp;</b></s>", "It is 4 ☃.</s>"]),
        (CHATML, Conversation(CALLS, TOOLS),
         ['<call>{"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}</call>'
          "<|im_end|>",
          "<think>The tool says so.</think>\nBlue.<|im_end|>"]),
        (CHATML, Conversation(TALK[:1]), []),
    ],
)  # fmt: skip
def test_answers_are_what_the_assistant_said_and_the_token_that_ends_it(
    tmp_path, template, talk, wanted
):
    as_file(tmp_path, template)
    codec = open_codec(tmp_path, 300)
    tokens, said = codec.encode(talk), codec.answers(talk)
    assert len(tokens) == len(said)
    runs, run = [], []
    for token, inside in zip(tokens, [*said, False], strict=False):
        if inside:
            run.append(token)
        elif run:
            runs.append(run)
            run = []
    runs += [run] if run else []
    found = [codec.tokenizer.decode(run, skip_special_tokens=False) for run in runs]
    assert [text.strip() for text in found] == wanted


def test_an_answer_without_words_stands_nowhere(tmp_path):
    as_file(tmp_path, BRACKETS)
    template = open_codec(tmp_path, 300).template
    silent = [TALK[0], {"role": "assistant", "content": ""}, *TALK[2:]]
    for talk, wanted in ((TALK, [TALK[1]["content"], TALK[3]["content"]]),
                         (silent, [TALK[3]["content"]])):  # fmt: skip
        text = template.render(Conversation(talk))
        spans = template.answers(Conversation(talk))
        assert [text[start:end] for start, end in spans] == wanted
