"""Data that timm's readers lack: small real sets, fetched and checked."""
