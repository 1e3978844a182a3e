//! Bytes: which kind a packet is (RFC 8656 §12), STUN messages, ChannelData. Imports nothing outside this module.
