"""Read-only analyses that passes share."""
