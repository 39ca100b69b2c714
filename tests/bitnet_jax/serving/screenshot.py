"""Draws the picture of the chat page in docs/serving.md, of a server that runs:

python -m tests.bitnet_jax.serving.screenshot http://127.0.0.1:8080 docs/chat.png
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tests.bitnet_jax.serving.browser import WIDTHS, browser

MESSAGES = ("What is a haiku?", "Write one about the sea.")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("file", type=Path)
    parser.add_argument("--width", choices=WIDTHS, default="desktop")
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    with browser(args.width, dark=args.dark) as page:
        page.get(args.address)
        settings = '{"temperature": 0, "max_tokens": 100}'
        page.execute_script("localStorage.setItem('bitnet-jax/settings', arguments[0])", settings)
        page.refresh()
        for message in MESSAGES:
            page.find_element("id", "message").send_keys(message + "\n")
            while not page.find_element("id", "send").is_displayed():
                time.sleep(0.1)
        page.save_screenshot(str(args.file))


if __name__ == "__main__":
    main()
