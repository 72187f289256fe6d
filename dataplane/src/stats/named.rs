#![forbid(unsafe_code)]
//! Enumerations whose variants have stable names, and counts of such.

/// Declares an enumeration with a stable snake_case name for each variant, in one place, so that
/// neither can miss the other: `name()`, `Display`, and `ALL` in the order they are written in.
#[macro_export]
macro_rules! named {
    (
        $(#[$of_all:meta])*
        $vis:vis enum $all:ident {
            $($(#[$doc:meta])* $variant:ident = $name:literal,)+
        }
    ) => {
        $(#[$of_all])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        $vis enum $all {
            $($(#[$doc])* $variant,)+
        }

        impl $all {
            /// All of them, in the order of their declaration.
            $vis const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// Stable snake_case name.
            $vis fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }

        impl std::fmt::Display for $all {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

/// How often each of such an enumeration was counted.
#[derive(Clone, Debug)]
pub struct Counts<T>(Vec<(T, u64)>);

impl<T: Copy + PartialEq> Counts<T> {
    /// None so far, in the order of `all`.
    pub fn new(all: &[T]) -> Self {
        Self(all.iter().map(|each| (*each, 0)).collect())
    }

    /// Counts one more of `which`.
    pub fn count(&mut self, which: T) {
        for (each, count) in &mut self.0 {
            *count += u64::from(*each == which);
        }
    }

    /// All of them with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (T, u64)> {
        self.0.iter().copied()
    }
}
