#![forbid(unsafe_code)]
//! Enumerations whose variants are counted under names.

/// Declares an enumeration with a stable snake_case name for each variant, in one place, so that
/// neither can miss the other: `name()`, `Display`, and `ALL` in the order of the counters.
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
            /// All of them, in the order of their counters.
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
