//! Which servers the host's resolver asks.

use std::net::IpAddr;

/// Servers taken at most; glibc asks three.
const SERVERS_MAX: usize = 8;

/// The addresses in a `resolv.conf`(5), loopback left out: those of a local stub, whose own servers
/// stand elsewhere.
pub fn resolvers(text: &str) -> Vec<IpAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            words.next().filter(|word| *word == "nameserver")?;
            words.next()?.split('%').next()?.parse::<IpAddr>().ok()
        })
        .filter(|server| !server.is_loopback())
        .take(SERVERS_MAX)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_stubs_and_nonsense_are_passed_over() {
        let text = "# nameserver 192.0.2.1\nsearch example\n nameserver 10.0.0.53 # office\n\
                    nameserver 127.0.0.53\nnameserver\nnameserver fe80::1%eth0\nnameserver x\n";
        let found: Vec<String> = resolvers(text).iter().map(IpAddr::to_string).collect();
        assert_eq!(found, ["10.0.0.53", "fe80::1"]);
        let many = "nameserver 10.0.0.1\n".repeat(100);
        assert_eq!(resolvers(&many).len(), SERVERS_MAX);
    }
}
