//! Points on the globe and what their distance means for a round trip.

/// Milliseconds of round trip for each kilometre between two ends: light in glass takes 0.01, and cables do not go
/// straight.
const MS_PER_KM: f64 = 0.015;
/// The least that light in glass takes, with a tenth off for coordinates that are those of a city.
const LEAST_MS_PER_KM: f64 = 0.009;
/// Mean radius of the earth.
const EARTH_KM: f64 = 6371.0;

/// A point on the globe, in degrees.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Place {
    latitude: f64,
    longitude: f64,
}

impl Place {
    /// `None` where it is not on the globe: latitude beyond ±90, longitude beyond ±180, not a number.
    pub fn new(latitude: f64, longitude: f64) -> Option<Self> {
        let is_on_it = (-90.0..=90.0).contains(&latitude) && (-180.0..=180.0).contains(&longitude);
        is_on_it.then_some(Self { latitude, longitude })
    }

    /// Latitude and longitude in degrees.
    pub fn degrees(self) -> [f64; 2] {
        [self.latitude, self.longitude]
    }

    /// Kilometres along the surface (haversine).
    pub fn km_to(self, other: Self) -> f64 {
        let [a, b] = [self.latitude.to_radians(), other.latitude.to_radians()];
        let (north, east) = ((b - a) / 2.0, (other.longitude - self.longitude).to_radians() / 2.0);
        let h = north.sin().powi(2) + a.cos() * b.cos() * east.sin().powi(2);
        2.0 * EARTH_KM * h.sqrt().min(1.0).asin()
    }

    /// The round trip to expect, in milliseconds, last miles not counted.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 20,016 km are 0 to 301 ms")]
    pub fn rtt_ms_to(self, other: Self) -> u32 {
        (self.km_to(other) * MS_PER_KM).round() as u32
    }

    /// The round trip that nothing is below, in milliseconds.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 20,016 km are 0 to 181 ms")]
    pub fn least_ms_to(self, other: Self) -> u32 {
        (self.km_to(other) * LEAST_MS_PER_KM) as u32
    }

    /// The cell of a grid of 5 degrees: row and column.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 36 and 0 to 72")]
    pub(super) fn cell(self) -> (u8, u8) {
        (((self.latitude + 90.0) / 5.0) as u8, ((self.longitude + 180.0) / 5.0) as u8)
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1}, {:.1}", self.latitude, self.longitude)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_those_of_the_globe() {
        let at = |latitude, longitude| Place::new(latitude, longitude).expect("on the globe");
        let cases = [
            ("Frankfurt to Ashburn", at(50.1, 8.7), at(39.0, -77.5), 6540.0),
            ("across the date line", at(0.0, 179.5), at(0.0, -179.5), 111.2),
            ("nowhere far", at(10.0, 10.0), at(10.0, 10.0), 0.0),
            ("to the other side", at(0.0, 0.0), at(0.0, 180.0), 20015.0),
        ];
        for (what, from, to, km) in cases {
            assert!((from.km_to(to) - km).abs() <= km * 0.01, "{what}: {}", from.km_to(to));
            assert!((to.km_to(from) - from.km_to(to)).abs() < 1e-6, "{what}");
        }
        assert_eq!(at(50.1, 8.7).rtt_ms_to(at(39.0, -77.5)), 98);
        for (latitude, longitude) in [(90.1, 0.0), (0.0, -180.1), (f64::NAN, 0.0), (0.0, f64::INFINITY)] {
            assert_eq!(Place::new(latitude, longitude), None);
        }
    }
}
