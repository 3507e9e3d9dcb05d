"""The keys of the chat's line editor that mean something else than in prompt_toolkit."""

from __future__ import annotations

from prompt_toolkit.buffer import Buffer
from prompt_toolkit.filters import has_selection, is_searching
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.search import accept_search
from wcwidth import iter_graphemes

__all__ = ["chat_keys"]


def chat_keys() -> KeyBindings:
    """Enter sends or continues, Ctrl-C clears or interrupts; one key press passes what is shown as one character.

    While the history is searched (Ctrl-R), Enter takes the line that was found, to edit or send it, and Ctrl-C leaves.
    """
    keys = KeyBindings()

    @keys.add("enter", filter=is_searching)
    def take_line(event: KeyPressEvent) -> None:
        accept_search()
        buffer = event.current_buffer
        buffer.cursor_position += buffer.document.get_end_of_line_position()

    @keys.add("enter", filter=~is_searching)
    def end_or_continue(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("c-c", filter=~is_searching)
    @keys.add("<sigint>")
    def clear_or_interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    @keys.add("escape", "enter", filter=~is_searching)
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("backspace", filter=~has_selection)
    @keys.add("c-h", filter=~has_selection)
    def delete_before(event: KeyPressEvent) -> None:
        for _ in range(event.arg):
            event.current_buffer.delete_before_cursor(_length_before(event.current_buffer))

    @keys.add("delete", filter=~has_selection)
    def delete_after(event: KeyPressEvent) -> None:
        for _ in range(event.arg):
            event.current_buffer.delete(_length_after(event.current_buffer))

    @keys.add("left")
    def go_left(event: KeyPressEvent) -> None:
        for _ in range(event.arg):
            event.current_buffer.cursor_left(_length_before(event.current_buffer))

    @keys.add("right")
    def go_right(event: KeyPressEvent) -> None:
        for _ in range(event.arg):
            event.current_buffer.cursor_right(_length_after(event.current_buffer))

    return keys


def _length_before(buffer: Buffer) -> int:
    """Code points of the character before the cursor, as a reader counts characters; of a line break 1."""
    *_, last = ["", *iter_graphemes(buffer.document.current_line_before_cursor)]
    return len(last) or 1


def _length_after(buffer: Buffer) -> int:
    """Code points of the character behind the cursor, as a reader counts characters; of a line break 1."""
    return len(next(iter_graphemes(buffer.document.current_line_after_cursor), "")) or 1
