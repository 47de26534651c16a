"""Chat templates of our own that write tool calls in the forms of the families, and as strictly as theirs."""

from __future__ import annotations

HERMES = r"""
{%- for m in messages %}
    {%- if loop.first and tools %}
        {{- '<|im_start|>system\n' + (m.content + '\n' if m.role == 'system' else '') + '<tools>' }}
        {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
        {{- "\n</tools>\nAnswer with <tool_call>\n{\"name\": ..., \"arguments\": ...}\n</tool_call><|im_end|>\n" }}
    {%- elif loop.first and m.role == 'system' %}
        {{- '<|im_start|>system\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
    {%- elif m.role != 'system' %}
        {{- '<|im_start|>' + m.role + '\n' + m.content }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
""".strip()

LLAMA3 = r"""
{%- for m in messages %}
    {%- if m.role == 'user' and tools and loop.first %}
        {{- '<|im_start|>user\nAnswer as {"name": function name, "parameters": dictionary of its arguments}.\n' }}
        {%- for tool in tools %}{{- tool | tojson(indent=4) + '\n' }}{%- endfor %}
        {{- m.content + '<|im_end|>' }}
    {%- elif m.tool_calls is defined %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception('a single call at once') }}{%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|im_start|>assistant\n{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) }}
        {{- '}<|im_end|>' }}
    {%- else %}
        {{- '<|im_start|>' + ('ipython' if m.role == 'tool' else m.role) + '\n' + m.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
""".strip()

MISTRAL = r"""
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if tools and loop.last %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
        {{- '[INST]' + m.content + '[/INST]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in m.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('nine characters') }}{%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + ('' if loop.last else ', ') }}
        {%- endfor %}
        {{- ']' }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS]{"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- m.content }}
    {%- endif %}
{%- endfor %}
""".strip()

MISTRAL_ARGS = r"""
{%- if tools %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '[INST]' + m.content + '[/INST]' }}
    {%- elif m.tool_calls %}
        {%- for call in m.tool_calls %}
            {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}
        {%- endfor %}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- m.content }}
    {%- endif %}
{%- endfor %}
""".strip()

_CHAT = r"""
{%- for m in messages %}
    {%- if loop.first and tools %}{{- '<|im_start|>system\n' + SHOWN + '<|im_end|>\n' }}{%- endif %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>tool\n' + m.content + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + m.content }}
        {%- for call in m.tool_calls or [] %}
            {%- set f = call.function %}CALL
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
""".strip()


def _chat(shown: str, call: str) -> str:
    return _CHAT.replace("SHOWN", shown).replace("CALL", call)


FUNCTIONS = _chat(
    r"""(tools | tojson) + '\n<tool_call>\n<function=f>\n<parameter=p>\nv\n</parameter>\n</function></tool_call>'""",
    r"""
            {{- '<tool_call>\n<function=' + f.name + '>\n' }}
            {%- for k, v in f.arguments.items() %}
                {{- '<parameter=' + k + '>\n' + (v if v is string else (v | tojson)) + '\n</parameter>\n' }}
            {%- endfor %}
            {{- '</function>\n</tool_call>' }}""",
)
KEYS = _chat(
    r"""(tools | tojson) + '\n<tool_call>{name}\n<arg_key>{key}</arg_key>\n<arg_value>{v}</arg_value>\n</tool_call>'""",
    r"""
            {{- '<tool_call>' + f.name + '\n' }}
            {%- for k, v in f.arguments.items() %}
                {{- '<arg_key>' + k + '</arg_key>\n<arg_value>' }}
                {{- (v if v is string else (v | tojson)) + '</arg_value>\n' }}
            {%- endfor %}
            {{- '</tool_call>' }}""",
)
PHI = _chat(
    r"""'<|tool|>' + (tools | tojson) + '<|/tool|>'""",
    r"""
            {{- '<|tool_call|>' + (f | tojson) + '<|/tool_call|>' }}""",
)
GRANITE = _chat(
    r"""(tools | tojson) + 'Answer with <|tool_call|> and a JSON list of calls.'""",
    r"""
            {{- '<|tool_call|>[' + (f | tojson) + ']' }}""",
)
_KEYWORDS = r"""
            {%- for k, v in f.arguments.items() %}
                {{- ('' if loop.first else ', ') + k + '=' + (v | tojson) }}
            {%- endfor %}"""
KEYWORDS = _chat(
    r"""'List of tools: <|tool_list_start|>' + (tools | tojson) + '<|tool_list_end|>'""",
    r"""
            {{- '<|tool_call_start|>[' + f.name + '(' }}"""
    + _KEYWORDS
    + r"""{{- ')]<|tool_call_end|>' }}""",
)
LINES = _chat(
    r"""'<functions>' + (tools | tojson) + '</functions>'""",
    r"""
            {{- '<function_calls>' + f.name + '(' }}"""
    + _KEYWORDS
    + r"""{{- ')</function_calls>' }}""",
)
GEMMA = _chat(
    r"""'<|tool>' + (tools | tojson) + '<tool|>'""",
    r"""
            {{- '<|tool_call>call:' + f.name + '{' }}
            {%- for k, v in f.arguments.items() %}
                {{- ('' if loop.first else ',') + k + ':' }}
                {{- ('<|"|>' + v + '<|"|>') if v is string else (v | tojson) }}
            {%- endfor %}
            {{- '}<tool_call|>' }}""",
)

BY_FORM = {
    "hermes": HERMES,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "mistral-args": MISTRAL_ARGS,
    "functions": FUNCTIONS,
    "keys": KEYS,
    "phi": PHI,
    "granite": GRANITE,
    "keywords": KEYWORDS,
    "lines": LINES,
    "gemma": GEMMA,
}
