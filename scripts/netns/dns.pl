#!/usr/bin/env perl
# A DNS server for a lab: answers A and AAAA from a file with lines "name address", read anew for each question, and
# "no such name" for all else. dns.pl ADDRESS FILE
use strict;
use warnings;
use Socket qw(:all);

my ($address, $file) = @ARGV;
my $family = $address =~ /:/ ? AF_INET6 : AF_INET;
my $packed = inet_pton($family, $address) or die "dns.pl: $address is no address\n";
socket(my $socket, $family, SOCK_DGRAM, 0) or die "dns.pl: $!\n";
my $at = $family == AF_INET ? pack_sockaddr_in(53, $packed) : pack_sockaddr_in6(53, $packed);
bind($socket, $at) or die "dns.pl: $!\n";
while (1) {
  my $from = recv($socket, my $question, 1500, 0);
  next unless defined $from && length($question) >= 12;
  my ($end, @labels) = 12;
  while ((my $length = unpack('C', substr($question, $end, 1)) // 0) > 0) {
    push @labels, substr($question, $end + 1, $length);
    $end += 1 + $length;
  }
  my $name = lc join('.', @labels);
  my ($type) = unpack('n', substr($question, $end + 1, 2));
  my ($known, @answers) = 0;
  open(my $zone, '<', $file) or die "dns.pl: $file: $!\n";
  while (<$zone>) {
    my ($owner, $value) = split;
    next unless defined $value && $owner eq $name;
    $known = 1;
    my ($of, $data) = $value =~ /:/ ? (28, inet_pton(AF_INET6, $value)) : (1, inet_pton(AF_INET, $value));
    # A pointer to the name in the question, type, class IN, no caching, the address.
    push @answers, pack('nnnNn/a', 0xc00c, $of, 1, 0, $data) if $of == $type;
  }
  close $zone;
  my $header = substr($question, 0, 2) . pack('nnnnn', $known ? 0x8580 : 0x8583, 1, scalar @answers, 0, 0);
  send($socket, $header . substr($question, 12, $end - 12 + 5) . join('', @answers), 0, $from);
}
