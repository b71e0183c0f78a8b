"""What each suite asks that this server does not do, and why.

A name is a check's, a test function's, a class's or a file's; `*` stands for anything. An entry
that is no longer needed makes the run fail.
"""

from __future__ import annotations

TEXTS = "expects the words of llama.cpp's own test model"
NO_MODEL = "the model is optional here: there is one"
OTHER_API = "another API, which is not served"
OWN_ENDPOINT = "an endpoint of llama.cpp's own"
OWN_FIELD = "a field of llama.cpp's own"
RESTARTS = "restarts the server with flags of llama.cpp's own"
FIRST_DELTA = "the first delta has content \"\", as OpenAI's has; llama.cpp's has null"
CAPABLE = "needs a model that can follow instructions; the demo model has 135 million weights"
TEXT_ONLY = "images: the models take text only"

LLAMA_CPP_FILES = {
    "compat_anthropic": OTHER_API,
    "compat_gcp": OTHER_API,
    "compat_oai_responses": OTHER_API,
    "completion": OWN_ENDPOINT,
    "embedding": OWN_ENDPOINT,
    "ignore_eos": OWN_ENDPOINT,
    "infill": OWN_ENDPOINT,
    "kv_keep_only_active": RESTARTS,
    "lora": OWN_ENDPOINT,
    "mcp_servers": OWN_ENDPOINT,
    "metrics": "names of llama.cpp's own",
    "proxy": OWN_ENDPOINT,
    "rerank": OWN_ENDPOINT,
    "router": RESTARTS,
    "sleep": RESTARTS,
    "slot_save": OWN_ENDPOINT,
    "speculative": RESTARTS,
    "stream": OWN_ENDPOINT,
    "template": OWN_ENDPOINT,
    "tools_builtin": OWN_ENDPOINT,
    "vision_api": TEXT_ONLY,
}
LLAMA_CPP_TESTS = {
    "basic": {
        "test_server_multiple_addresses": RESTARTS,
        "test_server_props": OWN_ENDPOINT,
        "test_server_models": "expects the name of llama.cpp's own test model",
        "test_server_slots": OWN_ENDPOINT,
        "test_load_split_model": OWN_ENDPOINT,
        "test_no_ui": RESTARTS,
        "test_server_model_aliases_and_tags": RESTARTS,
    },
    "chat_completion": {
        "test_chat_completion": TEXTS,
        "test_chat_completion_cached_tokens": TEXTS,
        "test_chat_completion_stream": TEXTS,
        "test_chat_completion_with_openai_library": TEXTS,
        "test_chat_template": OWN_FIELD,
        "test_chat_template_assistant_prefill": OWN_FIELD,
        "test_chat_template_continue_final_message_vllm_compat": OWN_FIELD,
        "test_chat_template_continue_final_message_mutual_exclusion": OWN_FIELD,
        "test_apply_chat_template": OWN_ENDPOINT,
        "test_completion_with_json_schema": OWN_FIELD,
        "test_completion_with_grammar": OWN_FIELD,
        "test_completion_with_invalid_grammar": OWN_FIELD,
        "test_completion_with_response_format[response_format0*": OWN_FIELD,
        "test_invalid_chat_completion_req[messages7]": "two answers in a row are taken",
        "test_chat_completion_with_timings_per_token": OWN_FIELD,
        "test_logprobs_stream": FIRST_DELTA,
        "test_context_size_exceeded": OWN_FIELD,
        "test_context_size_exceeded_stream": OWN_FIELD,
        "test_return_progress": OWN_FIELD,
        "test_chat_completions_token_count": OWN_ENDPOINT,
        "test_verbose_debug": OWN_FIELD,
    },
    "ctx_shift": {
        "test_ctx_shift_enabled": OWN_ENDPOINT,
        "test_ctx_shift_disabled_short_prompt": OWN_ENDPOINT,
        "test_ctx_shift_disabled_long_prompt": OWN_ENDPOINT,
    },
    "security": {
        "test_access_static_assets_without_api_key": "paths of llama.cpp's own page",
        "test_incorrect_api_key": RESTARTS,
        "test_correct_api_key": RESTARTS,
        "test_correct_api_key_anthropic_header": OTHER_API,
        "test_openai_library_correct_api_key": "calls a path without /v1",
        "test_cors_*": RESTARTS,
        "test_local_media_file*True]": TEXT_ONLY,
    },
    "tokenize": {
        "test_tokenize_with_bos": "expects a vocabulary with a begin token",
    },
    "tool_call": {
        "test_completion_with_required_tool_real_model*STREAMED]": FIRST_DELTA,
        "test_completion_with_required_tool_real_model*template_override*": "lacks its template",
        "test_completion_without_tool_call_fast*STREAMED]": FIRST_DELTA,
        "test_completion_without_tool_call_slow": "as test_completion_without_tool_call_fast",
        "test_weather": CAPABLE,
        "test_calc_result": CAPABLE,
        "test_thoughts": CAPABLE,
        "test_hello_world": CAPABLE,
    },
}

DESELECTED: dict[str, dict[str, str]] = {
    "openai-python": {},
    "openai-javascript": {},
    "llm-comply": {
        "chat-image-input": TEXT_ONLY,
        "chat-error-handling": NO_MODEL,
    },
    "compatcanary": {
        "responses.basic": OTHER_API,
        "responses.streaming": OTHER_API,
    },
    "provider-check": {
        "chat.pong": CAPABLE,
    },
    "langchain": {
        "*::test_agent_loop": CAPABLE,
        "*::test_json_mode": CAPABLE,
        "*::test_unicode_tool_call_integration": CAPABLE,
        "*::test_structured_output_pydantic_2_v1": CAPABLE,  # adds a permitted key
        "conformance/langchain_suite.py::TestUnit::test_serdes": "a snapshot of LangChain's",
    },
    "llama.cpp": {
        **{f"unit/test_{file}.py": reason for file, reason in LLAMA_CPP_FILES.items()},
        **{
            f"unit/test_{file}.py::{test}": reason
            for file, tests in LLAMA_CPP_TESTS.items()
            for test, reason in tests.items()
        },
    },
    "lm-eval": {},
    "schemathesis": {},
}
