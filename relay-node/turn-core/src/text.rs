//! Names from the wire are opaque bytes; here they become text for people, and bytes again.

/// Opaque bytes as text that is safe on a terminal and can be turned back by [`unescape`]: what is not printable
/// UTF-8 is `\xNN`, a backslash is `\\`.
pub fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let hex = |text: &mut String, bytes: &[u8]| bytes.iter().for_each(|byte| *text += &format!("\\x{byte:02x}"));
    for chunk in bytes.utf8_chunks() {
        for char in chunk.valid().chars() {
            match char {
                '\\' => text.push_str("\\\\"),
                '"' | '\'' => text.push(char),
                // escape_debug knows what does not print: controls, marks without a base, direction overrides.
                _ if char.escape_debug().count() == 1 => text.push(char),
                _ => hex(&mut text, char.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        hex(&mut text, chunk.invalid());
    }
    text
}

/// What [`escape`] wrote, as bytes again; for user names on the command line.
///
/// # Errors
/// A line that says how a backslash is written.
pub fn unescape(text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        bytes.extend_from_slice(&rest.as_bytes()[..at]);
        let escaped = &rest[at + 1..];
        if let Some(after) = escaped.strip_prefix('\\') {
            bytes.push(b'\\');
            rest = after;
            continue;
        }
        let digits = escaped.strip_prefix('x').and_then(|digits| digits.get(..2));
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(byte.ok_or("a backslash is written \\\\, a byte \\xNN")?);
        rest = &escaped[3..];
    }
    bytes.extend_from_slice(rest.as_bytes());
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opaque_bytes_survive_the_terminal_and_the_way_back() {
        let cases: &[(&[u8], &str)] = &[
            (b"1700000000:alice", "1700000000:alice"),
            ("zoë \"q\"".as_bytes(), "zoë \"q\""),
            (b"a\x1b[2Jb\n", "a\\x1b[2Jb\\x0a"),
            (b"\xff\x00\\", "\\xff\\x00\\\\"),
            (b"\\xff", "\\\\xff"),
            (b"", ""),
            ("\u{202e}x".as_bytes(), "\\xe2\\x80\\xaex"),
        ];
        for (raw, expected) in cases {
            assert_eq!(escape(raw), *expected);
            assert_eq!(unescape(expected).as_deref(), Ok(*raw));
        }
        for wrong in ["\\", "\\x", "\\x1", "\\xzz", "\\n", "\\x1é"] {
            assert!(unescape(wrong).is_err(), "{wrong}");
        }
    }
}
