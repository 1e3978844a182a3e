//! What can be said of a screenshot without looking at it.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};

/// A picture, summed up.
#[derive(Clone, Copy, Debug)]
pub struct Picture {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Mean luminance, 0 (black) to 255 (white).
    pub luminance: f64,
    /// Different colours, counted to 1,000.
    pub colours: usize,
}

impl Picture {
    /// Reads a PNG of 8-bit RGB or RGBA.
    ///
    /// # Errors
    /// It is none.
    pub fn of(png: &[u8]) -> Result<Self> {
        let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info()?;
        let mut pixels = vec![0; reader.output_buffer_size().context("too large")?];
        let info = reader.next_frame(&mut pixels)?;
        let channels = info.color_type.samples();
        ensure!(info.bit_depth == png::BitDepth::Eight && channels >= 3, "not 8-bit RGB: {info:?}");
        let (mut sum, mut colours) = (0.0, BTreeSet::new());
        let pixels = pixels[..info.buffer_size()].chunks_exact(channels);
        let count = pixels.len();
        for pixel in pixels {
            sum += 0.2126 * f64::from(pixel[0]) + 0.7152 * f64::from(pixel[1]) + 0.0722 * f64::from(pixel[2]);
            if colours.len() < 1000 {
                colours.insert([pixel[0], pixel[1], pixel[2]]);
            }
        }
        Ok(Self { width: info.width, height: info.height, luminance: sum / count as f64, colours: colours.len() })
    }
}
