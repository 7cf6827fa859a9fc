"""How bytes move between ranks. A transport offers one operation: every rank sends each other rank its own message."""
