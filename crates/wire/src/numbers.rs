//! Enumerations whose values have numbers and names.

/// What [`named_numbers!`](crate::named_numbers) makes, for code that is about any of them.
pub trait Named: Copy + 'static {
    /// Every value, in the order of the numbers.
    const ALL: &'static [Self];

    /// Its number.
    fn number(self) -> u8;

    /// Its name.
    fn name(self) -> &'static str;

    /// The value with this number.
    fn from_number(number: u8) -> Option<Self>;

    /// The value with this name, in capitals or not.
    fn from_name(name: &str) -> Option<Self>;
}

/// Declares enumerations, each value once with its number and its name. The names of a specification's numbers leave
/// out their common prefix.
#[macro_export]
macro_rules! named_numbers {
    ($($(#[$meta:meta])* pub enum $type:ident { $($(#[$doc:meta])* $value:ident = $number:literal $name:literal,)* })*) => { $(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum $type { $($(#[$doc])* $value = $number,)* }

        impl $type {
            /// Every value, in the order of the numbers.
            pub const ALL: &[$type] = &[$($type::$value),*];

            /// The value with this number.
            pub const fn from_number(number: u8) -> Option<$type> {
                match number {
                    $($number => Some($type::$value),)*
                    _ => None,
                }
            }

            /// Its name.
            pub const fn name(self) -> &'static str {
                match self {
                    $($type::$value => $name,)*
                }
            }

            /// The value with this name, in capitals or not.
            pub fn from_name(name: &str) -> Option<$type> {
                Self::ALL.iter().copied().find(|value| value.name().eq_ignore_ascii_case(name))
            }
        }

        impl $crate::Named for $type {
            const ALL: &'static [$type] = $type::ALL;

            #[inline]
            fn number(self) -> u8 {
                self as u8
            }

            #[inline]
            fn name(self) -> &'static str {
                self.name()
            }

            #[inline]
            fn from_number(number: u8) -> Option<$type> {
                $type::from_number(number)
            }

            fn from_name(name: &str) -> Option<$type> {
                $type::from_name(name)
            }
        }
    )* };
}
