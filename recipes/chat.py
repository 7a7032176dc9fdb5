"""Talk to a LISA model about an image in the terminal.

    python recipes/chat.py outputs/quickstart --image scene.png

Type a question, drop a file or paste a URL to talk about another image, or type a command:

    /image FILE|URL   talk about another image
    /mask             show the last answer's masks over the image
    /save DIR         save the conversation: texts, masks and overlays
    /reset            forget the conversation, keep the image
    /help             list the commands
    /quit             leave; Ctrl-D does too

Ctrl-C stops an answer.
"""

import argparse
import base64
import io
import os
import shlex
import shutil
import signal
import sys
import tempfile
import webbrowser
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import PIL.Image
import PIL.ImageOps

from lisa_hf.errors import report_user_errors
from lisa_hf.evaluation.visualization import COLORS, overlay_masks
from lisa_hf.inference.annotation_files import save_conversation
from lisa_hf.inference.arguments import add_model_arguments
from lisa_hf.inference.conversation import Conversation
from lisa_hf.model.images import load_image
from lisa_hf.model.processing_lisa import SEG_TOKEN
from lisa_hf.training.build import load_lisa


COMMANDS = __doc__[__doc__.index("    /image") : __doc__.index("\n\nCtrl-C")]
# Byte tokens can spell escape sequences that control a terminal.
CONTROL_CHARACTERS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="LISA model: directory or Hub id")
    parser.add_argument("--image", help="image file or URL to start with")
    add_model_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_arguments()
    with suppress(ImportError):  # lets the arrow keys edit the line and recall earlier ones; not on Windows
        import readline  # noqa: F401
    with report_user_errors():
        image = load_image(args.image) if args.image else None  # before weights are loaded
        model, processor = load_lisa(args.model, dtype=args.dtype)
        model.to(args.device).eval()

        def start(image: str | PIL.Image.Image) -> Conversation:
            conversation = Conversation(model, processor, image, args.max_new_tokens)
            print("{} x {} pixels. Ask a question, or see /help.".format(*conversation.image.size))
            return conversation

        conversation = start(image) if image else None
    while (line := read_line()) not in (None, "/quit", "exit", "quit"):
        try:
            match line.split(maxsplit=1):
                case []:
                    pass
                case ["/help"]:
                    print(COMMANDS)
                case ["/image", image]:
                    conversation = start(read_path(image))
                case _ if is_image(line):
                    conversation = start(read_path(line))
                case ["/image" | "/save" as command]:
                    print(
                        f"expected {command} {'FILE or URL' if command == '/image' else 'DIR'}, got {command} alone."
                    )
                case _ if conversation is None:
                    print("Open an image first: /image FILE")
                case ["/mask"]:
                    show_masks(conversation)
                case ["/save", directory]:
                    save_conversation(conversation, Path(read_path(directory)))
                    print(f"Saved: {Path(read_path(directory)).resolve()}")
                case ["/reset"]:
                    conversation.turns.clear()
                case [command, *_] if command.startswith("/"):
                    print(f"expected a command, got {line}. The commands are:\n{COMMANDS}")
                case _:
                    print_answer(conversation, line)
        except (OSError, ValueError) as error:
            print(f"error: {error}")


def read_line() -> str | None:
    """Return the next line, or None at the end of the input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            print("\nCtrl-D leaves.")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return None


def read_path(text: str) -> str:
    """Return the path or URL that a user typed, pasted or dropped: with quotes, backslashes, `~` or `file://`."""
    if text.startswith("file://"):
        return url2pathname(urlsplit(text).path)
    if "://" in text or Path(text).exists():
        return text
    if sys.platform == "win32":  # where a backslash separates directories
        return os.path.expanduser(text.strip('"'))
    with suppress(ValueError):  # an apostrophe is not a quote
        words = shlex.split(text)
        text = words[0] if len(words) == 1 else text
    return os.path.expanduser(text)


def is_image(line: str) -> bool:
    """Return whether a line is nothing but a URL or the path of a file."""
    if line.startswith(("http://", "https://")):
        return len(line.split()) == 1
    try:
        return Path(read_path(line)).is_file()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def print_answer(conversation: Conversation, question: str):
    """Print the answer to a question while it is generated, with each `[SEG]` in the color of its mask."""
    number, is_colored = 0, sys.stdout.isatty() and "NO_COLOR" not in os.environ
    is_stopped = False

    def stop(*_):
        nonlocal is_stopped
        is_stopped = True
        conversation.stop()

    handler = signal.signal(signal.SIGINT, stop)
    try:
        for piece in conversation.ask(question):
            texts = piece.translate(CONTROL_CHARACTERS).split(SEG_TOKEN)
            for text in texts[:-1]:
                color = ";".join(map(str, COLORS[number % len(COLORS)]))
                seg = f"\033[1;97;48;2;{color}m{SEG_TOKEN}\033[0m" if is_colored else SEG_TOKEN  # white letters
                print(text + seg, end="", flush=True)
                number += 1
            print(texts[-1], end="", flush=True)
    finally:
        signal.signal(signal.SIGINT, handler)
    print(" (stopped)" if is_stopped else "")


def show_masks(conversation: Conversation):
    """Show the masks of the last answer in the terminal if possible, else in a file."""
    if not conversation.turns or len(conversation.turns[-1].answer.masks) == 0:
        print(f"The last answer has no {SEG_TOKEN}. Ask as in training: '... Please output segmentation mask.'")
        return
    overlay = overlay_masks(conversation.image, conversation.turns[-1].answer.masks.numpy())
    if sys.stdout.isatty() and (sequence := picture_in_terminal(overlay)):
        print(sequence)
        return
    with tempfile.NamedTemporaryFile(prefix="overlay_", suffix=".png", delete=False) as file:
        overlay.save(file, "PNG")
    print(f"Saved: {file.name}")
    has_display = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if has_display:
        webbrowser.open(Path(file.name).as_uri())


def picture_in_terminal(picture: PIL.Image.Image) -> str | None:
    """Return the escape sequence that shows a picture at half the terminal's height; None if unsupported."""
    picture = PIL.ImageOps.contain(picture, (min(picture.width, 1280), min(picture.height, 1280)))
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    # iTerm2 and WezTerm: https://iterm2.com/documentation-images.html
    if os.environ.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
        return f"\033]1337;File=inline=1;height=50%:{data}\a"
    # kitty and Ghostty: https://sw.kovidgoyal.net/kitty/graphics-protocol. In tmux, which cannot forward them,
    # TERM differs.
    if os.environ.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        columns, lines = shutil.get_terminal_size()
        is_wide = lines * picture.width > columns * picture.height  # a character is twice as tall as it is wide
        size = f"c={columns}" if is_wide else f"r={lines // 2}"
        *chunks, last = [data[start : start + 4096] for start in range(0, len(data), 4096)]
        parts = [(chunk, 1) for chunk in chunks] + [(last, 0)]
        return "".join(
            f"\033_G{f'a=T,f=100,{size},' if number == 0 else ''}m={has_more};{chunk}\033\\"
            for number, (chunk, has_more) in enumerate(parts)
        )
    return None


if __name__ == "__main__":
    main()
