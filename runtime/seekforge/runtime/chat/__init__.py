"""Conversations of DeepSeek-V3.2: messages to a prompt, and a completion back to a message, while it comes."""

from __future__ import annotations

from seekforge.runtime.chat.encoding import encode
from seekforge.runtime.chat.messages import Message, MessageDelta, ToolCall, ToolCallDelta
from seekforge.runtime.chat.parser import ChatParser
from seekforge.runtime.chat.request import ChatOptions, ChatProcessor, ChatRequest
from seekforge.runtime.chat.scanner import Scanner, Span
from seekforge.runtime.chat.template import ChatTemplate
from seekforge.runtime.text.segments import Segment, SegmentedText

__all__ = [
    "ChatOptions",
    "ChatParser",
    "ChatProcessor",
    "ChatRequest",
    "ChatTemplate",
    "Message",
    "MessageDelta",
    "Scanner",
    "Segment",
    "SegmentedText",
    "Span",
    "ToolCall",
    "ToolCallDelta",
    "encode",
]
