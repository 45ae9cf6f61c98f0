"""Tickets compared with each other, and carried to other programs and back (docs/exchange.md)."""
