"""Stream a completion from a running server: each finished block arrives as one piece.

vllm serve MODEL --plugin osdt --served-model-name mini
python examples/streaming.py
"""

import argparse

from openai import OpenAI


def main() -> None:
    """Print every piece as it comes, then what the last one says of the decoding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000/v1", help="base URL of the server's OpenAI endpoints")
    parser.add_argument("--model", default="mini", help="name under which the model is served")
    parser.add_argument("--prompt", default="quiz : pick one beast . A saw B dog C plum . Answer:")
    args = parser.parse_args()

    stream = OpenAI(base_url=args.url, api_key="none").completions.create(
        model=args.model,
        prompt=args.prompt,
        max_tokens=96,
        stream=True,
        extra_body={"osdt_task": "quiz"},
    )
    for piece in stream:
        if piece.choices and piece.choices[0].text:
            print("piece:", repr(piece.choices[0].text), flush=True)
        if hasattr(piece, "osdt"):  # the last one
            print("decoded:", piece.osdt)


if __name__ == "__main__":
    main()
